"""Reads the tensors of checkpoint files, one at a time: safetensors, and `.bin` without torch.

Both formats hold raw arrays behind an index. The index is read and checked as a whole, the
arrays are memory-mapped when asked for.
"""

import collections
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from keras_mamba2.conversion.pickles import read_bin
from keras_mamba2.conversion.stored_tensor import MOST_AXES
from keras_mamba2.conversion.stored_tensor import StoredTensor
from keras_mamba2.conversion.stored_tensor import check_not_pointer
from keras_mamba2.host.finite import FLOATS
from keras_mamba2.preset_files import CHECKPOINT_WEIGHTS
from keras_mamba2.preset_files import read_json
from keras_mamba2.untrusted import is_file
from keras_mamba2.untrusted import parse_json
from keras_mamba2.untrusted import shortened
from keras_mamba2.untrusted import some

# Not `safe_open` of the safetensors library: its `get_tensor` copies a tensor into memory, where a
# memory map costs none, and its errors say neither which file is damaged nor what is missing.
LONGEST_HEADER = (
    25_000_000  # enough for 100,000 tensors, and what JSON makes of it fits into memory
)
SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


class _Span(NamedTuple):
    start: int
    end: int


def read_tensors(folder) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in `folder` by name; `.read()` gives the array of one.

    safetensors are taken before `.bin`, one file before shards.

    Raises:
        ValueError: that names the file, if there is none, a shard is missing, or one is
            truncated, damaged, foreign or unsafe.
    """
    folder = pathlib.Path(folder)
    found = [folder / name for name in CHECKPOINT_WEIGHTS if is_file(folder / name)]
    if not found:
        raise ValueError(
            f"{folder} holds no weights. Expected one of: {', '.join(CHECKPOINT_WEIGHTS)}"
        )
    if found[0].suffix != ".json":
        return read_file(found[0])
    return _read_shards(found[0])


def most_common_dtype(folder) -> str:
    """The dtype that most of the weights' numbers in `folder` have, by its Keras name.

    Some checkpoints keep a few small weights in float32. Raises as `read_tensors`, and for files
    without tensors.
    """
    counts: collections.Counter[str] = collections.Counter()
    for tensor in read_tensors(folder).values():
        if tensor.dtype in FLOATS:  # others are refused when they are loaded
            counts[str(tensor.dtype)] += tensor.extent
    if not counts:
        raise ValueError(f"The files of weights in {folder} hold no floating point tensors.")
    return counts.most_common(1)[0][0]


def _read_shards(index: pathlib.Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{index} has no `weight_map`.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{index} must name a file for {shortened(tensor)!r}. Received: {shortened(name)}"
            )
        if not name or pathlib.Path(name).name != name:
            raise ValueError(f"{index} names a shard outside its folder: {shortened(name)!r}")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.with_name(name)
        if not is_file(shard):
            raise ValueError(
                f"{shortened(str(shard))} is missing, a shard that {index.name} names."
            )
        in_shard = read_file(shard)
        if twice := sorted(set(tensors) & set(in_shard)):
            raise ValueError(f"{shard} holds tensors that another shard holds: {some(twice)}")
        tensors.update(in_shard)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ValueError(f"{index} names tensors that no shard holds: {some(missing)}")
    return tensors


def read_file(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one file, safetensors or `.bin`, by name."""
    check_not_pointer(file)
    return read_safetensors(file) if file.suffix == ".safetensors" else read_bin(file)


def read_safetensors(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name."""
    header, start = _read_header(file)
    tensors = {name: _entry(file, name, header[name], start) for name in header}
    size = file.stat().st_size
    end = start
    # As the format wants it: no byte belongs to two tensors, or to none.
    for name, tensor in sorted(tensors.items(), key=_span):
        if tensor.offset != end:
            what = "overlaps with the one before" if tensor.offset < end else "follows a hole"
            raise ValueError(f"{file} is damaged: the data of {shortened(name)!r} {what}.")
        end = tensor.end
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise ValueError(f"{file} is {state}: its header tells {end} bytes, it has {size}.")
    return tensors


def _span(item: tuple[str, StoredTensor]) -> _Span:
    return _Span(item[1].offset, item[1].end)


def _read_header(file: pathlib.Path) -> tuple[dict, int]:
    """The header without its metadata, and where the data start."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or stream.read(1) not in (b"{", b""):
            raise ValueError(f"{file} is not a safetensors file.")
        if length > LONGEST_HEADER:
            raise ValueError(f"{file} is not a safetensors file: its header has {length} bytes.")
        if 8 + length > size:
            raise ValueError(f"{file} is truncated: the header alone is {length} bytes.")
        stream.seek(8)
        header = parse_json(stream.read(length), f"{file} is damaged: its header is not JSON")
    if not isinstance(header, dict):
        raise ValueError(f"{file} is damaged: its header is not a JSON object.")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length


def _entry(file: pathlib.Path, name: str, entry: Mapping, start: int) -> StoredTensor:
    try:
        dtype, shape, span = entry["dtype"], tuple(entry["shape"]), _Span(*entry["data_offsets"])
        sound = isinstance(dtype, str) and len(shape) <= MOST_AXES
        sound = sound and all(type(i) is int and i >= 0 for i in (*shape, *span))
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(
            f"{file} is damaged: its header says of {shortened(name)!r}: {shortened(entry)}"
        )
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(
            f"{file} holds {shortened(name)!r} in a dtype that is not supported: {shortened(dtype)}"
        )
    tensor = StoredTensor.contiguous(file, SAFETENSORS_DTYPES[dtype], shape, start + span.start)
    if tensor.end != start + span.end:
        raise ValueError(
            f"{file} is damaged: {shortened(name)!r} of shape {shortened(shape)} and dtype {dtype} "
            f"cannot have {span.end - span.start} bytes."
        )
    return tensor
