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

from keras_mamba2.host import state_file
from keras_mamba2.host.rows import NO_TOKEN as NO_TOKEN
from keras_mamba2.host.state_file import COUNTS
from keras_mamba2.host.state_file import checksum as checksum
from keras_mamba2.host.state_file import filled
from keras_mamba2.host.state_file import stored_dtype
from keras_mamba2.layers.sublayer import StateTensor

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


def save(file, state, backbone, text: str = "", own: str | None = None) -> None:
    """See `Mamba2State.save`. `own` is the fingerprint of the backbone, if it is known."""
    check_belongs(state, backbone)
    longest = int(np.max(ops.convert_to_numpy(state.length), initial=0))
    tensors = {}
    for i, (layer, specs) in enumerate(zip(state.layers, backbone.state_spec(), strict=True)):
        for (name, leaf), (_, spec) in zip(named_leaves(layer), named_leaves(specs), strict=True):
            array = _array(filled(leaf, spec, longest), spec)
            _check_room(array, spec, longest)
            tensors[f"{name}.{i}"] = array
    for name in COUNTS:
        tensors[name] = np.asarray(ops.convert_to_numpy(getattr(state, name)))
    own = own or fingerprint(backbone)
    state_file.write(file, tensors, backbone.architecture, own, text)


def _check_room(array: np.ndarray, spec: StateTensor, longest: int) -> None:
    """Raises if attention has less than `longest` tokens, which no file could tell."""
    if spec.room_axis is not None and array.shape[spec.room_axis + 1] < longest:
        raise ValueError(
            f"The state has keys and values of {array.shape[spec.room_axis + 1]} tokens, and a row "
            f"of {longest}. Read documents that share a row as rows of their own, and a text with "
            "`prefill`, which makes room."
        )


def _array(leaf, spec) -> np.ndarray:
    if isinstance(leaf, np.ndarray):  # what is on the host does not go over the device
        return np.ascontiguousarray(leaf, stored_dtype(spec))
    return np.ascontiguousarray(ops.convert_to_numpy(ops.cast(leaf, stored_dtype(spec))))


def load(file, backbone, own: str | None = None) -> StoredState:
    """Reads a file of `save`. `own` as there.

    Raises:
        ValueError: that names the file, if it is missing, truncated, damaged, of another version,
            or the state of another model.
    """
    specs = named_specs(backbone)
    tensors, text = state_file.read(
        file,
        specs,
        backbone.architecture,
        lambda: own or fingerprint(backbone),
        backbone.vocabulary_size,
    )
    leaves = [ops.convert_to_tensor(tensors[name], spec.dtype) for name, spec in specs.items()]
    counts = {name: ops.convert_to_tensor(tensors[name], "int32") for name in COUNTS}
    layers = tree.pack_sequence_as(backbone.state_spec(), leaves)
    return StoredState(tuple(layers), **counts, text=text)


def named_specs(backbone) -> dict[str, StateTensor]:
    """What each tensor of a state is, by its name in a file, in the order of `tree.flatten`."""
    layers = enumerate(backbone.state_spec())
    return {f"{name}.{i}": spec for i, layer in layers for name, spec in named_leaves(layer)}


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
        sample = ops.take(ops.reshape(backbone.value_of(variable), (-1,)), where)
        sample = ops.convert_to_numpy(ops.cast(sample, "float32"))
        digest.update(json.dumps([variable.path, list(variable.shape)]).encode())
        digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()
