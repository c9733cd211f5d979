import math
import operator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras import tree

from keras_mamba2._compat.trees import register_pytree
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import instance
from keras_mamba2.arguments import several
from keras_mamba2.state import files
from keras_mamba2.state.room import with_equal_room

NO_TOKEN = files.NO_TOKEN


class Mamba2State:
    """What a model remembers of the tokens that it has read.

    The state of a mixer has a fixed size, however many tokens it has read. The state of attention
    holds keys and values, with room that grows.

    A pytree with batch-first leaves, so it can be passed through `jax.jit`, gathered by rows in
    beam search and donated. Arrays are never changed in place: a state stays as it was when a text
    is continued from it.

    Args:
        layers: sequence of the states of the blocks' sublayers; of a mixer a `MixerState`, with
            conv `(b k-1 e+2gn)` and ssm `(b h p n)`, of attention an `AttentionState`.
        token: int32 `(b)`, the last token, which the layers have not read yet; -1 for none. So
            generation can go on from a state with more text, or without.
        length: int32 `(b)`, how many tokens the layers have read.
        digest: int32 `(b)`, a number for these tokens, which tells texts apart.

    Example:
    ```python
    state = lm.prefill("Once upon a time")
    lm.generate(" there was", state=state)
    lm.generate("", state=state)
    ```
    """

    def __init__(self, layers: Sequence[Any], token: Any, length: Any, digest: Any):
        self.layers = tuple(layers)
        self.token = token
        self.length = length
        self.digest = digest

    def with_token(self, token) -> "Mamba2State":
        return Mamba2State(self.layers, token, self.length, self.digest)

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
        n = SIZE("n", n)
        return tree.map_structure(lambda leaf: ops.repeat(leaf, n, axis=0), self)

    @staticmethod
    def concatenate(states: Sequence["Mamba2State"]) -> "Mamba2State":
        """The rows of all `states` in one batch.

        Raises:
            ValueError: for states of different models.
        """
        states = several(STATE)("states", states)
        if not states:
            raise ValueError("There are no states to concatenate.")
        leaves = [ops.concatenate(leaves, axis=0) for leaves in with_equal_room(states)]
        return tree.pack_sequence_as(states[0], leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return sum(
            math.prod(leaf.shape) * np.dtype(keras.backend.standardize_dtype(leaf.dtype)).itemsize
            for leaf in tree.flatten(self.layers)
        )

    def save(self, file, backbone, text: str = "") -> None:
        """Writes a safetensors file, which `load` reads with the same model.

        Args:
            file: path. It is replaced when the new one is complete.
            backbone: the `Mamba2Backbone` that the state belongs to.
            text: string to keep with it.
        """
        files.save(file, self, backbone, text)

    @classmethod
    def load(cls, file, backbone) -> "Mamba2State":
        """Reads a file of `save`.

        Raises:
            ValueError: that names the file, if it is missing, truncated, damaged, of another
                version, or the state of another model.
        """
        *parts, _ = files.load(file, backbone)
        return cls(*parts)

    def __repr__(self) -> str:
        first = ", ".join(
            f"{name} {tuple(leaf.shape)}" for name, leaf in files.named_leaves(self.layers[0])
        )
        return f"Mamba2State({len(self.layers)} layers, batch size {self.batch_size}, {first})"

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return (*self.layers, self.token, self.length, self.digest), None

    @classmethod
    def tree_unflatten(cls, metadata: None, children: Sequence[Any]) -> "Mamba2State":
        *layers, token, length, digest = children
        return cls(layers, token, length, digest)

    # On the torch backend `keras.tree` wants them under these names, in this order.
    def torchtree_flatten(self) -> tuple[list[Any], None]:
        return list(self.tree_flatten()[0]), None

    @classmethod
    def torchtree_unflatten(cls, children: Sequence[Any], metadata: None) -> "Mamba2State":
        return cls.tree_unflatten(metadata, children)


register_pytree(Mamba2State)


STATE = instance(Mamba2State, "a `Mamba2State`, which `prefill` returns")
