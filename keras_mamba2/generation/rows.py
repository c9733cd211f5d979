"""The data of a running loop that belongs to each row alone."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops
from keras import tree

from keras_mamba2.state import NO_TOKEN

# Fewer stop tokens are padded to this number, so that another number compiles nothing anew.
STOP_TOKEN_CAPACITY = 8


class Rows(NamedTuple):
    """The progress of each row of a batch. All arrays are batch-first, as in the state.

    Nothing is shared between rows, so that a row may be put in or taken out while others go on.
    """

    state: Any  # Mamba2State; the last token of each row is its `token`, not read yet
    remaining: Any  # (b) int32, how many more tokens may come; 0 for a row that has stopped
    stop_token_ids: Any  # (b s) int32, -1 where there are fewer
    seen: Any  # (b v) bool, which ids occurred in a row, if the sampler needs it; else (b 0)
    keys: Any  # (b r) int, a seed for each random generator of the sampler
    sampling: Any  # `Sampling` `(b)`; empty for a sampler without such parameters


def stop_tokens(stop_token_ids: Sequence[int], batch_size: int) -> np.ndarray:
    """The same stop tokens for every row, `(b s)`."""
    size = -(-max(len(stop_token_ids), 1) // STOP_TOKEN_CAPACITY) * STOP_TOKEN_CAPACITY
    stops = np.full((batch_size, size), NO_TOKEN, "int32")
    stops[:, : len(stop_token_ids)] = stop_token_ids
    return stops


def put(rows, index, row):
    """`rows` with `row`, a batch of one, at `index`: both pytrees with batch-first leaves."""

    def put_leaf(leaf, new):
        return ops.slice_update(leaf, (index, *[0] * (len(leaf.shape) - 1)), new)

    return tree.map_structure(put_leaf, rows, row)


def take(rows, index):
    """The row at `index` as a batch of one."""
    return select(rows, index[None])


def select(rows, indices):
    """The rows at `indices` `(n)`, in this order."""
    return tree.map_structure(lambda leaf: ops.take(leaf, indices, axis=0), rows)
