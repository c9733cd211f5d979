"""The file of a state: what a model remembers of a text, as safetensors. Knows no model."""

import hashlib
import json
from collections.abc import Callable
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from keras_mamba2.atomic_files import atomic_file
from keras_mamba2.host.finite import is_finite
from keras_mamba2.host.rows import NO_TOKEN
from keras_mamba2.host.tensor_file import save_tensors
from keras_mamba2.untrusted import check_file
from keras_mamba2.untrusted import shortened
from keras_mamba2.untrusted import some

FILE_VERSION = "4"
# What a state holds beside its layers, int32 `(b)` each.
COUNTS = ("token", "length", "digest")
ROW_BYTES = 2048  # of a checksum
METADATA = ("version", "model", "fingerprint", "text", "checksum")


class TensorSpec(Protocol):
    """What one tensor of a state is, without its batch axis: a `layers.StateTensor`."""

    @property
    def shape(self) -> tuple[int | None, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def room_axis(self) -> int | None: ...


def write(file, tensors: Mapping[str, np.ndarray], model: str, fingerprint: str, text: str) -> None:
    """Writes a file for `read`. It appears when it is complete.

    Args:
        file: path.
        tensors: dict of arrays, by the names of `read`, floats as float32.
        model: string, the architecture.
        fingerprint: string, of the weights.
        text: string to keep with it.

    Raises:
        ValueError: for numbers that are not finite.
        OSError: if it cannot be written.
    """
    if bad := [name for name, array in tensors.items() if not is_finite(array)]:
        raise ValueError(
            f"The state holds numbers that are not finite, in {some(bad)}: nothing can go on from "
            "it, and it is not saved."
        )
    metadata = {
        "version": FILE_VERSION,
        "model": model,
        "text": text,
        "fingerprint": fingerprint,
    }
    metadata["checksum"] = checksum(tensors, metadata)
    with atomic_file(file) as temporary:
        save_tensors(temporary, tensors, metadata)


def read(
    file,
    specs: Mapping[str, TensorSpec],
    model: str,
    fingerprint: Callable[[], str],
    vocabulary_size: int,
) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a file of `write`, and the text beside them.

    Args:
        file: path.
        specs: dict of what each tensor of a layer must be, beside those of `COUNTS`.
        model: string, the architecture that the state must belong to.
        fingerprint: function that returns that of its weights.
        vocabulary_size: int.

    Raises:
        ValueError: that names the file, if it is missing, truncated, damaged, of another version,
            or the state of another model.
    """
    metadata, tensors = _read(file)
    _check_metadata(file, metadata)
    if metadata["checksum"] != checksum(tensors, metadata):
        raise ValueError(
            f"{file} is damaged: its checksum is another than when it was written. A state cannot "
            "be repaired; start a session with the text."
        )
    for key, own in (("model", model), ("fingerprint", fingerprint())):
        if metadata[key] != own:
            differ = "has other weights" if key == "fingerprint" else f"is {own}"
            raise ValueError(
                f"{file} is the state of another model, {shortened(metadata['model'])}. "
                f"This one {differ}."
            )
    try:
        _check_tensors(tensors, specs, vocabulary_size)
    except ValueError as error:
        raise ValueError(f"{file} is not the file of a state of this model: {error}") from error
    return tensors, metadata["text"]


def filled(leaf, spec: TensorSpec, length: int):
    """The part of one tensor of a state, with its batch axis, that `length` tokens have filled."""
    if spec.room_axis is None:
        return leaf
    return leaf[(slice(None),) * (spec.room_axis + 1) + (slice(length),)]


def stored_dtype(spec: TensorSpec) -> str:
    """Floats are stored as float32, which holds every bfloat16 exactly."""
    return "float32" if "float" in spec.dtype else spec.dtype


def checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Of all that a file of a state holds: names, shapes and numbers, and the texts beside them.

    It finds damage, not intent: flipped bits, and pieces that are cut, moved or overwritten.
    Numbers are added up in rows of bytes, and the sums are hashed: to hash all of them takes 15
    times as long. Two changes that cancel each other in one row are not found.
    """
    digest = hashlib.sha256()
    texts = {key: text for key, text in metadata.items() if key != "checksum"}
    shapes = {name: [str(array.dtype), *array.shape] for name, array in tensors.items()}
    digest.update(json.dumps([texts, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        stored = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)
        rows, rest = np.split(stored, [stored.size - stored.size % ROW_BYTES])
        digest.update(rows.view("<u8").reshape(-1, ROW_BYTES // 8).sum(axis=1).data)
        digest.update(rest.data)
    return digest.hexdigest()


def _check_metadata(file, metadata: Mapping[str, str]) -> None:
    version = metadata.get("version")
    if version != FILE_VERSION:
        older = version is not None and version.isdecimal() and int(version[:9]) < int(FILE_VERSION)
        remedy = (
            " It was written by an earlier version of this package. Its text is kept: "
            f"`safetensors.safe_open({str(file)!r}, 'numpy').metadata()['text']`. Start a session "
            "with that."
        )
        raise ValueError(
            f"{file} is not the file of a state that this version reads."
            f"{remedy if older else ''} Expected: version={FILE_VERSION!r}. "
            f"Received: {shortened(version)!r}"
        )
    if missing := [key for key in METADATA if key not in metadata]:
        raise ValueError(f"{file} is not the file of a state: it has no {', '.join(missing)}.")


def _check_tensors(
    tensors: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec], vocabulary_size: int
) -> None:
    """Raises for what `save` never writes, though the checksum fits."""
    expected = {*specs, *COUNTS}
    if set(tensors) != expected:
        raise ValueError(
            f"its tensors are others. Missing: {some(sorted(expected - set(tensors)))}. "
            f"Without a place: {some(sorted(set(tensors) - expected))}"
        )
    rows = tensors["token"].shape
    for name in COUNTS:
        if tensors[name].shape != rows or len(rows) != 1 or tensors[name].dtype != "int32":
            raise ValueError(
                f"{name} is {tensors[name].dtype} {tensors[name].shape}, not int32 (b)"
            )
    token, length = tensors["token"], tensors["length"]
    if ((token < NO_TOKEN) | (token >= vocabulary_size)).any():
        raise ValueError(f"token must be {NO_TOKEN} to {vocabulary_size - 1}. Received: {token}")
    if (length < 0).any():
        raise ValueError(f"length must not be negative. Received: {length}")
    longest = int(length.max(initial=0))
    for name, spec in specs.items():
        array, dtype = tensors[name], stored_dtype(spec)
        # `save` cuts the room to the longest row.
        sizes = [longest if i == spec.room_axis else size for i, size in enumerate(spec.shape)]
        if array.shape != (*rows, *sizes) or array.dtype != dtype:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, not {dtype} {(*rows, *sizes)}"
            )
        if not is_finite(array):
            raise ValueError(f"{name} holds numbers that are not finite")


def _read(file) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError
    from safetensors import safe_open

    check_file(file)
    try:
        with safe_open(file, "numpy") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return stored.metadata() or {}, tensors
    # Of damaged headers the library says what it will, and of dtypes that numpy lacks.
    except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        reason = shortened(str(error))
        raise ValueError(f"{file} is truncated, or not the file of a state: {reason}") from error
