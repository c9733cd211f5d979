"""Reads `pytorch_model.bin` without torch, and without running what a pickle asks for.

Such a file is a zip archive: a pickle, `data.pkl`, and one uncompressed entry for each storage.
A pickle names functions to be called. Here a name stands for something harmless of our own, or
is refused before anything is called. What a zip archive says twice, in front of an entry and at its
end, must agree, and what it says once is bounded. The checksums of storages are kept for whoever
reads them: `StoredTensor.storage`.
"""

import collections
import io
import math
import pathlib
import pickle
import pickletools
import re
import zipfile
from typing import Any
from typing import BinaryIO
from typing import NamedTuple

import ml_dtypes
import numpy as np

from keras_mamba2.conversion.stored_tensor import MOST_AXES
from keras_mamba2.conversion.stored_tensor import Storage
from keras_mamba2.conversion.stored_tensor import StoredTensor
from keras_mamba2.untrusted import shortened

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
ZIP_LOCAL_HEADER = 30  # bytes, before the name and the extra field of an entry
ZIP_LOCAL_SIGNATURE = b"PK\x03\x04"
ZIP_UTF8 = 0x800  # a flag of an entry
# A thousand times what it is for 2.7B parameters. One byte can become an object of 64.
LONGEST_PICKLE = 10_000_000
LONGEST_BYTEORDER = 16
# What makes a value that `torch.save` uses twice: names, functions, tensors. Of values that hold
# others, each of them twice, some hundred bytes would make one that nobody can print or hash.
PLAIN = re.compile(r"(STACK_)?GLOBAL|.*(UNICODE|STRING|BYTES|INT|LONG)\d?|REDUCE|BINPERSID")


class _Refused(ValueError):
    """A pickle named something that a checkpoint does not need."""


class _Elements(NamedTuple):
    """A storage as numbers."""

    dtype: np.dtype
    size: int
    storage: Storage


def read_bin(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one `.bin` file by name.

    Raises:
        ValueError: that names the file, if it is truncated, damaged, foreign, or its pickle
            names anything but dicts, tensors and storages. Nothing of the pickle has run then.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            truncated = stream.read(4) == ZIP_LOCAL_SIGNATURE
        reason = "truncated" if truncated else "not a checkpoint in the zip format of torch >= 1.6"
        raise ValueError(f"{file} is {reason}.")
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            tensors = _Unpickler.of(file, archive, stream).load()
    except _Refused as error:
        raise ValueError(
            f"{file} is refused: its pickle names {shortened(str(error))}, which is no part of a "
            "checkpoint. Nothing in it was run."
        ) from None
    # A damaged pickle can raise anything, from its opcodes or from what it passes to us.
    except Exception as error:
        raise ValueError(f"{file} is damaged: {_reason(error)}") from error
    return _checked(file, tensors)


def _reason(error: Exception) -> str:
    """Other libraries say little: `KeyError` only a key, `EOFError` nothing."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return shortened(text)


def _checked(file: pathlib.Path, tensors) -> dict[str, StoredTensor]:
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} must hold a dict of tensors, not a {type(tensors).__name__}.")
    tensors = dict(dict.items(tensors))  # a pickle can set an attribute `items`
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise ValueError(
                f"{file} must hold tensors by name. Received: {shortened(repr(name))}: "
                f"{type(tensor).__name__}"
            )
    return tensors


class _Unpickler(pickle.Unpickler):
    file: pathlib.Path
    archive: zipfile.ZipFile
    stream: BinaryIO
    prefix: str

    @classmethod
    def of(cls, file, archive, stream) -> "_Unpickler":
        entries = archive.namelist()
        if len(set(entries)) != len(entries):
            raise ValueError("its zip archive has two entries of one name")
        names = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
        if len(names) != 1:
            raise ValueError(f"it has {len(names) or 'no'} data.pkl")
        prefix = names[0].removesuffix("data.pkl")
        if prefix + "byteorder" in entries:
            order = _content(archive, prefix + "byteorder", LONGEST_BYTEORDER)
            if order != b"little":
                raise ValueError(f"its byte order is {order!r}")
        content = _content(archive, names[0], LONGEST_PICKLE)
        _check_opcodes(content)
        unpickler = cls(io.BytesIO(content))
        unpickler.file, unpickler.archive, unpickler.stream = file, archive, stream
        unpickler.prefix = prefix
        return unpickler

    def find_class(self, module, name):
        # What stands in must be immutable, since a pickle can also set attributes and states: a
        # storage class is its name, a function a bound method.
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) not in allowed:
            raise _Refused(f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid) -> _Elements:
        kind, storage_type, key, _, size = pid
        known = isinstance(storage_type, str) and storage_type in STORAGES
        if kind != "storage" or not known or type(key) is not str or type(size) is not int:
            raise ValueError(f"it names a storage of an unknown kind: {shortened(pid)}")
        dtype = STORAGES[storage_type]
        info = self.archive.getinfo(f"{self.prefix}data/{key}")
        _check_stored(info)
        if info.file_size != size * dtype.itemsize:
            raise ValueError(f"storage {key} has {info.file_size} bytes for {size} elements")
        offset = self._data_offset(info)
        return _Elements(dtype, size, Storage(self.file, offset, info.file_size, info.CRC))

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where the data of an entry begin, which only the header in front of them tells."""
        self.stream.seek(info.header_offset)
        header = self.stream.read(ZIP_LOCAL_HEADER)
        sizes = [int.from_bytes(header[i : i + 2], "little") for i in (26, 28)]  # name, extra field
        name = self.stream.read(sizes[0])
        encoding = "utf-8" if info.flag_bits & ZIP_UTF8 else "cp437"
        if header[:4] != ZIP_LOCAL_SIGNATURE or name != info.orig_filename.encode(encoding):
            raise ValueError(f"the two headers of its entry {info.filename} disagree")
        return info.header_offset + ZIP_LOCAL_HEADER + sum(sizes)

    def _tensor(self, elements, first, shape, strides, requires_grad, hooks, metadata=None):
        if not isinstance(elements, _Elements):
            raise ValueError(f"a tensor is one of {type(elements).__name__}, not of a storage")
        shape, strides = tuple(shape), tuple(strides)
        integers = all(type(i) is int and i >= 0 for i in (first, *shape, *strides))
        if not integers or len(shape) > MOST_AXES:
            raise ValueError(
                f"a tensor has shape {shortened(shape)}, strides {shortened(strides)}, "
                f"offset {shortened(first)}"
            )
        dtype, size, storage = elements
        offset = storage.offset + first * dtype.itemsize
        tensor = StoredTensor(self.file, dtype, shape, strides, offset, storage)
        if len(shape) != len(strides) or first + tensor.extent > size:
            raise ValueError(f"a tensor of shape {shortened(shape)} reaches beyond its storage")
        if math.prod(shape) > tensor.extent:  # read, it could take any amount of memory
            raise ValueError(
                f"elements of a tensor of shape {shortened(shape)} share a place. Save it after "
                "`contiguous()`"
            )
        return tensor

    def _parameter(self, tensor, requires_grad, hooks):
        if not isinstance(tensor, StoredTensor):
            raise ValueError(f"a parameter is one of {type(tensor).__name__}, not of a tensor")
        return tensor


def _content(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A small entry, whose checksum `zipfile` compares."""
    info = archive.getinfo(name)
    _check_stored(info)
    if info.file_size > limit:
        raise ValueError(f"its entry {info.filename} is larger than {limit} bytes")
    return archive.read(info)


def _check_stored(info: zipfile.ZipInfo) -> None:
    """Raises for a compressed entry: `torch.save` writes none, and a small one can be gigabytes."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"its entry {info.filename} is compressed")


def _check_opcodes(content: bytes) -> None:
    """Raises for a pickle whose memo, or what it makes of it, needs more memory than bytes."""
    last = ""
    memo: dict[Any, bool] = {}  # whether a place may be read
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if "PUT" in name and (not isinstance(argument, int) or argument > len(content)):
            raise ValueError(f"its pickle has an index of the memo of {argument}")
        if name == "DUP" or ("GET" in name and not memo.get(argument)):
            raise ValueError("its pickle uses a value twice that may hold others")
        if "PUT" in name or name == "MEMOIZE":
            index = len(memo) if name == "MEMOIZE" else argument
            memo[index] = PLAIN.fullmatch(last) is not None
        elif name != "FRAME":
            last = name
