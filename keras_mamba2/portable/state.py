"""What exported programs remember of texts."""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import instance
from keras_mamba2.host.room import LEAST_ROOM
from keras_mamba2.host.rows import NO_TOKEN
from keras_mamba2.portable.manifest import StoredTensorSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "token", "length", "digest"],
    meta_fields=["specs"],
)
@dataclasses.dataclass(frozen=True)
class ProgramState:
    """What exported programs remember of texts: as `keras_mamba2.Mamba2State`, without Keras.

    Made by `Programs.prefill`. It stays as it was when a text is continued from it.

    Args:
        layers: tuple of arrays, batch-first.
        token: int32 `(b)`, the last token, which the layers have not read yet; -1 for none.
        length: int32 `(b)`, how many tokens the layers have read.
        digest: int32 `(b)`, a number for these tokens, which tells texts apart.
        specs: tuple, what each of `layers` is.
    """

    layers: tuple[Any, ...]
    token: Any
    length: Any
    digest: Any
    specs: tuple[StoredTensorSpec, ...]

    @classmethod
    def zeros(
        cls, specs: Sequence[StoredTensorSpec], batch_size: int, room: int = LEAST_ROOM
    ) -> "ProgramState":
        """The state before the first token, with room for some tokens where it needs room."""
        counts = np.zeros(batch_size, "int32")
        layers = (
            np.zeros((batch_size, *spec.sizes(room)), jnp.dtype(spec.dtype)) for spec in specs
        )
        return cls(tuple(layers), counts + np.int32(NO_TOKEN), counts, counts, tuple(specs))

    @property
    def batch_size(self) -> int:
        return self.token.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.layers)

    @property
    def room(self) -> int | None:
        """How many tokens it has room for; None if its size does not depend on that."""
        for leaf, spec in zip(self.layers, self.specs, strict=True):
            if spec.room_axis is not None:
                return leaf.shape[spec.room_axis + 1]
        return None

    def with_room(self, room: int | None) -> "ProgramState":
        """The same state with room for at least `room` tokens."""
        if self.room is None or room is None or room <= self.room:
            return self
        layers = tuple(
            leaf if spec.room_axis is None else _padded(leaf, spec.room_axis + 1, room)
            for leaf, spec in zip(self.layers, self.specs, strict=True)
        )
        return dataclasses.replace(self, layers=layers)

    def __getitem__(self, rows: int | slice) -> "ProgramState":
        """The state of one row, as a batch of one, or of a slice of rows."""
        if not isinstance(rows, slice):
            row = operator.index(rows)
            if not -self.batch_size <= row < self.batch_size:
                raise IndexError(f"Row {row} of a state with {self.batch_size} rows.")
            rows = slice(row % self.batch_size, row % self.batch_size + 1)
        return self._of_rows(np.arange(self.batch_size)[rows])

    def repeat(self, n: int) -> "ProgramState":
        """Each row `n` times, one after the other: independent continuations of one text."""
        return self._of_rows(np.repeat(np.arange(self.batch_size), SIZE("n", n)))

    @staticmethod
    def concatenate(states: Sequence["ProgramState"]) -> "ProgramState":
        """The rows of all `states` in one batch."""
        room = max((state.room for state in states if state.room is not None), default=None)
        states = [state.with_room(room) for state in states]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *states)

    def _of_rows(self, rows: np.ndarray) -> "ProgramState":
        return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], self)

    def __repr__(self) -> str:
        return f"ProgramState(batch size {self.batch_size}, {self.nbytes} bytes)"


def _padded(leaf, axis: int, size: int) -> np.ndarray:
    widths = [(0, 0)] * leaf.ndim
    widths[axis] = (0, size - leaf.shape[axis])
    return np.pad(np.asarray(leaf), widths)


STATE = instance(ProgramState, "a `ProgramState`, which `Programs.prefill` returns")
