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

FILE_VERSION = "2"
# What a state holds beside its layers, int32 `(b)` each.
COUNTS = ("token", "length", "digest")
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
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata)


def _array(leaf, spec) -> np.ndarray:
    """float32 holds what a convolution's state has in bfloat16, bit for bit."""
    dtype = "float32" if "float" in spec.dtype else spec.dtype
    return np.ascontiguousarray(ops.convert_to_numpy(ops.cast(leaf, dtype)))


def load(file, backbone) -> StoredState:
    """Reads a file of `save`.

    Raises:
        ValueError: that names the file, if it is missing, truncated, of another version, or the
            state of another model.
    """
    metadata, tensors = _read(file)
    if metadata.get("version") != FILE_VERSION:
        raise ValueError(
            f"{file} is not the file of a state that this version reads. "
            f"Expected: version={FILE_VERSION!r}. Received: {metadata.get('version')!r}"
        )
    for key, own in (("model", backbone.architecture), ("fingerprint", fingerprint(backbone))):
        if metadata[key] != own:
            differ = "has other weights" if key == "fingerprint" else f"is {own}"
            raise ValueError(
                f"{file} is the state of another model, {metadata['model']}. This one {differ}."
            )
    layers = [
        tree.pack_sequence_as(
            layer,
            [
                ops.convert_to_tensor(tensors[f"{name}.{i}"], spec.dtype)
                for name, spec in named_leaves(layer)
            ],
        )
        for i, layer in enumerate(backbone.state_spec())
    ]
    counts = {name: ops.convert_to_tensor(tensors[name], "int32") for name in COUNTS}
    return StoredState(tuple(layers), **counts, text=metadata["text"])


def _read(file) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError
    from safetensors import safe_open

    try:
        with safe_open(file, "numpy") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return stored.metadata() or {}, tensors
    except FileNotFoundError:
        raise ValueError(f"{file} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is truncated, or not the file of a state: {error}") from error


def _open_axes(spec: StateTensor, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """`shape` of a row's tensor, but for the room in it."""
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
    # In an order of its own: layers quantized in memory list their weights in another than loaded.
    for variable in sorted(backbone.weights, key=lambda variable: variable.path):
        size = math.prod(variable.shape)
        where = np.linspace(0, size - 1, min(size, FINGERPRINT_SAMPLES)).astype("int32")
        sample = ops.take(ops.reshape(variable.value, (-1,)), where)
        sample = ops.convert_to_numpy(ops.cast(sample, "float32"))
        digest.update(json.dumps([variable.path, list(variable.shape)]).encode())
        digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()
