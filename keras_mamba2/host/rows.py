"""The data of a running decode loop, and what its results mean."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

NO_TOKEN = -1
NOT_FINITE = -2  # instead of a token: the logits were NaN or infinite
# The decode loop returns to the host after this many tokens, so one program serves any number.
DECODE_CAPACITY = 256
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
    context: Any = ()  # what a proposer of tokens knows of the text; empty without one


def stop_tokens(
    stop_token_ids: Sequence[int], batch_size: int, capacity: int = STOP_TOKEN_CAPACITY
) -> np.ndarray:
    """The same stop tokens for every row, `(b s)`, where s is a multiple of `capacity`."""
    size = -(-max(len(stop_token_ids), 1) // capacity) * capacity
    stops = np.full((batch_size, size), NO_TOKEN, "int32")
    stops[:, : len(stop_token_ids)] = stop_token_ids
    return stops
