import hashlib
import json
import math
import operator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_mamba2._compat.trees import register_pytree
from keras_mamba2.atomic_files import atomic_file
from keras_mamba2.layers.mamba2_mixer import MixerState

NO_TOKEN = -1
FILE_VERSION = "1"
# Enough of every weight to tell two models apart, without reading gigabytes.
FINGERPRINT_SAMPLES = 256


class Mamba2State:
    """What a Mamba-2 model remembers of the tokens before, of one size whatever their number.

    A pytree with batch-first leaves, so it can be passed through `jax.jit`, gathered by rows in
    beam search and donated. Arrays are never changed in place: a state that was continued from
    still is what it was.

    Args:
        layers: sequence of `MixerState`, one a layer: conv `(b k-1 e+2gn)`, ssm `(b h p n)`.
        token: int32 `(b)`, the last token, which the layers have not seen yet; -1 for none. So
            a state can be continued with more text or without.
        length: int32 `(b)`, how many tokens the layers have seen.

    Example:
    ```python
    state = lm.prefill("Once upon a time")
    lm.generate(" there was", state=state)
    lm.generate("", state=state)
    ```
    """

    def __init__(self, layers: Sequence[MixerState], token: Any, length: Any):
        self.layers = tuple(layers)
        self.token = token
        self.length = length

    def with_token(self, token) -> "Mamba2State":
        return Mamba2State(self.layers, token, self.length)

    @property
    def batch_size(self) -> int:
        return self.token.shape[0]

    def __getitem__(self, rows: int | slice) -> "Mamba2State":
        """The state of one row, as a batch of one, or of a slice of rows."""
        if not isinstance(rows, slice):
            row = operator.index(rows)
            if not -self.batch_size <= row < self.batch_size:
                raise IndexError(f"Row {row} of a state with {self.batch_size} rows.")
            rows = slice(row % self.batch_size, row % self.batch_size + 1)
        return tree.map_structure(lambda leaf: leaf[rows], self)

    def repeat(self, n: int) -> "Mamba2State":
        """Each row `n` times, one after the other: independent continuations of one text."""
        if n < 1:
            raise ValueError(f"`n` must be positive. Received: n={n}")
        return tree.map_structure(lambda leaf: ops.repeat(leaf, n, axis=0), self)

    @staticmethod
    def concatenate(states: Sequence["Mamba2State"]) -> "Mamba2State":
        """The rows of all `states` in one batch."""
        if not states:
            raise ValueError("There are no states to concatenate.")
        return tree.map_structure(lambda *leaves: ops.concatenate(leaves, axis=0), *states)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return sum(
            math.prod(leaf.shape) * np.dtype(keras.backend.standardize_dtype(leaf.dtype)).itemsize
            for layer in self.layers
            for leaf in layer
        )

    def save(self, file, backbone, text: str = "") -> None:
        """Writes a safetensors file, which `load` reads with the same model.

        Args:
            file: path. It is replaced when the new one is complete.
            backbone: the `Mamba2Backbone` that the state belongs to.
            text: string to keep with it.
        """
        from safetensors.numpy import save_file

        check_belongs(self, backbone)
        metadata = {"version": FILE_VERSION, "model": describe(backbone), "text": text}
        metadata["fingerprint"] = fingerprint(backbone)
        # float32 holds what a convolution's state has in bfloat16, bit for bit.
        tensors = {
            name: np.asarray(ops.convert_to_numpy(ops.cast(leaf, "float32")))
            for i, layer in enumerate(self.layers)
            for name, leaf in ((f"conv.{i}", layer.conv), (f"ssm.{i}", layer.ssm))
        }
        for name in ("token", "length"):
            tensors[name] = np.asarray(ops.convert_to_numpy(getattr(self, name)))
        with atomic_file(file) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, file, backbone) -> "Mamba2State":
        """Reads a file of `save`.

        Raises:
            ValueError: that names the file, if it is missing, truncated, of another version, or
                the state of another model.
        """
        return load_with_text(file, backbone)[0]

    def __repr__(self) -> str:
        conv, ssm = self.layers[0]
        return (
            f"Mamba2State({len(self.layers)} layers, batch size {self.batch_size}, "
            f"conv {tuple(conv.shape)}, ssm {tuple(ssm.shape)})"
        )

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return (*self.layers, self.token, self.length), None

    @classmethod
    def tree_unflatten(cls, metadata: None, children: Sequence[Any]) -> "Mamba2State":
        *layers, token, length = children
        return cls(layers, token, length)

    # On the torch backend `keras.tree` wants them under these names, in this order.
    def torchtree_flatten(self) -> tuple[list[Any], None]:
        return list(self.tree_flatten()[0]), None

    @classmethod
    def torchtree_unflatten(cls, children: Sequence[Any], metadata: None) -> "Mamba2State":
        return cls.tree_unflatten(metadata, children)


def load_with_text(file, backbone) -> tuple[Mamba2State, str]:
    """`Mamba2State.load`, and the text that was saved with it."""
    from safetensors import SafetensorError
    from safetensors import safe_open

    try:
        with safe_open(file, "numpy") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{file} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is truncated, or not the file of a state: {error}") from error
    if metadata.get("version") != FILE_VERSION:
        raise ValueError(
            f"{file} is not the file of a state that this version reads. "
            f"Expected: version={FILE_VERSION!r}. Received: {metadata.get('version')!r}"
        )
    for key, own in (("model", describe(backbone)), ("fingerprint", fingerprint(backbone))):
        if metadata[key] != own:
            differ = "has other weights" if key == "fingerprint" else f"is {own}"
            raise ValueError(
                f"{file} is the state of another model, {metadata['model']}. This one {differ}."
            )
    layers = [
        MixerState(
            ops.convert_to_tensor(tensors[f"conv.{i}"], backbone.compute_dtype),
            ops.convert_to_tensor(tensors[f"ssm.{i}"], "float32"),
        )
        for i in range(backbone.num_layers)
    ]
    token, length = (ops.convert_to_tensor(tensors[name], "int32") for name in ("token", "length"))
    return Mamba2State(layers, token, length), metadata["text"]


def check_belongs(state: Mamba2State, backbone) -> None:
    """Raises unless `state` has the shapes of `backbone`."""
    mixers = [block.mixer for block in backbone.blocks]
    expected = [
        ((m.conv_kernel_size - 1, m.conv_dim), (m.num_heads, m.head_dim, m.state_dim))
        for m in mixers
    ]
    received = [tuple(tuple(leaf.shape[1:]) for leaf in layer) for layer in state.layers]
    if received != expected:
        raise ValueError(
            "The state belongs to another model. Expected, for each row: "
            f"{len(expected)} layers of conv {expected[0][0]} and ssm {expected[0][1]}. Received: "
            f"{len(received)} layers of conv {received[0][0]} and ssm {received[0][1]}"
        )


def describe(backbone) -> str:
    """The architecture, so that an error can name it."""
    sizes = ("num_layers", "hidden_dim", "state_dim", "head_dim", "num_groups", "expansion")
    sizes += ("conv_kernel_size", "vocabulary_size")
    values = ", ".join(f"{name}={getattr(backbone, name)}" for name in sizes)
    return f"Mamba2Backbone({values}, dtype={backbone.compute_dtype})"


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


register_pytree(Mamba2State)
