"""States on disk, and whether a state belongs to a model: driven by `backbone.state_spec()`."""

import hashlib
import json
import math
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops
from keras import tree

from keras_mamba2.atomic_files import atomic_file
from keras_mamba2.layers.sublayer import StateTensor
from keras_mamba2.state.room import filled
from keras_mamba2.untrusted import check_file
from keras_mamba2.untrusted import shortened
from keras_mamba2.untrusted import some

FILE_VERSION = "3"
# What a state holds beside its layers, int32 `(b)` each.
COUNTS = ("token", "length", "digest")
NO_TOKEN = -1
METADATA = ("version", "model", "fingerprint", "text", "checksum")
# Enough of every weight to tell two models apart, without reading gigabytes.
FINGERPRINT_SAMPLES = 256


class StoredState(NamedTuple):
    """What a file of a state holds."""

    layers: tuple[Any, ...]
    token: Any  # (b) int32
    length: Any  # (b) int32
    digest: Any  # (b) int32
    text: str


def named_leaves(state, *path: str) -> Iterator[tuple[str, Any]]:
    """The tensors of one sublayer's state with their names, such as `conv` and `ssm`."""
    if hasattr(state, "_fields"):
        parts = zip(state._fields, state, strict=True)
    elif isinstance(state, (tuple, list)):
        parts = zip(map(str, range(len(state))), state, strict=True)
    else:
        yield ".".join(path), state
        return
    for name, part in parts:
        yield from named_leaves(part, *path, name)


def save(file, state, backbone, text: str = "") -> None:
    """See `Mamba2State.save`."""
    from safetensors.numpy import save_file

    check_belongs(state, backbone)
    metadata = {"version": FILE_VERSION, "model": backbone.architecture, "text": text}
    metadata["fingerprint"] = fingerprint(backbone)
    longest = int(np.max(ops.convert_to_numpy(state.length), initial=0))
    tensors = {}
    for i, (layer, specs) in enumerate(zip(state.layers, backbone.state_spec(), strict=True)):
        for (name, leaf), (_, spec) in zip(named_leaves(layer), named_leaves(specs), strict=True):
            tensors[f"{name}.{i}"] = _array(filled(leaf, spec, longest), spec)
    for name in COUNTS:
        tensors[name] = np.asarray(ops.convert_to_numpy(getattr(state, name)))
    if bad := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
        raise ValueError(
            f"The state holds numbers that are not finite, in {some(bad)}: nothing can go on from "
            "it, and it is not saved."
        )
    metadata["checksum"] = checksum(tensors, metadata)
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata)


def _array(leaf, spec) -> np.ndarray:
    return np.ascontiguousarray(ops.convert_to_numpy(ops.cast(leaf, _stored_dtype(spec))))


def _stored_dtype(spec: StateTensor) -> str:
    """Floats are stored as float32, which holds every bfloat16 exactly."""
    return "float32" if "float" in spec.dtype else spec.dtype


def checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Of all that a file of a state holds: names, shapes and numbers, and the texts beside them."""
    digest = hashlib.sha256()
    texts = {key: text for key, text in metadata.items() if key != "checksum"}
    shapes = {name: [str(array.dtype), *array.shape] for name, array in tensors.items()}
    digest.update(json.dumps([texts, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
    return digest.hexdigest()


def load(file, backbone) -> StoredState:
    """Reads a file of `save`.

    Raises:
        ValueError: that names the file, if it is missing, truncated, damaged, of another version,
            or the state of another model.
    """
    metadata, tensors = _read(file)
    _check_metadata(file, metadata, tensors)
    for key, own in (("model", backbone.architecture), ("fingerprint", fingerprint(backbone))):
        if metadata[key] != own:
            differ = "has other weights" if key == "fingerprint" else f"is {own}"
            raise ValueError(
                f"{file} is the state of another model, {shortened(metadata['model'])}. "
                f"This one {differ}."
            )
    specs = backbone.state_spec()
    named = [
        (f"{name}.{i}", spec) for i, layer in enumerate(specs) for name, spec in named_leaves(layer)
    ]
    try:
        _check_tensors(tensors, dict(named), backbone.vocabulary_size)
    except ValueError as error:
        raise ValueError(f"{file} is not the file of a state of this model: {error}") from error
    leaves = [ops.convert_to_tensor(tensors[name], spec.dtype) for name, spec in named]
    counts = {name: ops.convert_to_tensor(tensors[name], "int32") for name in COUNTS}
    layers = tree.pack_sequence_as(specs, leaves)
    return StoredState(tuple(layers), **counts, text=metadata["text"])


def _check_metadata(file, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    version = metadata.get("version")
    if version != FILE_VERSION:
        older = version is not None and version.isdigit() and int(version) < int(FILE_VERSION)
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
    if metadata["checksum"] != checksum(tensors, metadata):
        raise ValueError(
            f"{file} is damaged: its checksum is another than when it was written. A state cannot "
            "be repaired; start a session with the text."
        )


def _check_tensors(
    tensors: Mapping[str, np.ndarray], specs: Mapping[str, StateTensor], vocabulary_size: int
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
        array, dtype = tensors[name], _stored_dtype(spec)
        # `save` cuts the room to the longest row.
        sizes = [longest if i == spec.room_axis else size for i, size in enumerate(spec.shape)]
        if array.shape != (*rows, *sizes) or array.dtype != dtype:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, not {dtype} {(*rows, *sizes)}"
            )
        if not np.isfinite(array).all():
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


def _open_axes(spec: StateTensor, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """The shape of a row's tensor, with `None` for the size of its room."""
    return tuple(None if i == spec.room_axis else size for i, size in enumerate(shape))


def check_belongs(state, backbone) -> None:
    """Raises unless the tensors of `state` have the shapes of `backbone.state_spec()`."""
    specs = [dict(named_leaves(layer)) for layer in backbone.state_spec()]
    layers = [dict(named_leaves(layer)) for layer in state.layers]
    expected = [{name: spec.shape for name, spec in layer.items()} for layer in specs]
    received = [{name: tuple(leaf.shape[1:]) for name, leaf in layer.items()} for layer in layers]
    if [list(layer) for layer in specs] == [list(layer) for layer in layers]:
        received = [
            {name: _open_axes(layer[name], shape) for name, shape in shapes.items()}
            for layer, shapes in zip(specs, received, strict=True)
        ]
    if received != expected:
        raise ValueError(
            "The state belongs to another model. Expected, for each row: "
            f"{_summary(expected)}. Received: {_summary(received)}"
        )


def _summary(layers: Sequence[Mapping[str, tuple[int | None, ...]]]) -> str:
    first = " and ".join(f"{name} {shape}" for layer in layers[:1] for name, shape in layer.items())
    return f"{len(layers)} layers of {first}"


def fingerprint(backbone) -> str:
    """A hash of samples of every weight: training changes it, saving and loading does not."""
    digest = hashlib.sha256()
    # Sorted: a layer that was quantized in memory lists its weights in another order than loaded.
    for variable in sorted(backbone.weights, key=lambda variable: variable.path):
        size = math.prod(variable.shape)
        where = np.linspace(0, size - 1, min(size, FINGERPRINT_SAMPLES)).astype("int32")
        sample = ops.take(ops.reshape(variable.value, (-1,)), where)
        sample = ops.convert_to_numpy(ops.cast(sample, "float32"))
        digest.update(json.dumps([variable.path, list(variable.shape)]).encode())
        digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()
