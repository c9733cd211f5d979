from typing import NamedTuple

import numpy as np

from keras_mamba2.state import Mamba2State


class KnownPrefix(NamedTuple):
    """The state after the tokens that a text begins with; `None` after none."""

    token_ids: np.ndarray
    state: Mamba2State | None

    def begins(self, token_ids: np.ndarray) -> bool:
        size = len(self.token_ids)
        return size <= len(token_ids) and np.array_equal(self.token_ids, token_ids[:size])


class KnownPrefixes:
    """States after the beginnings of texts, so that a text is read from where it is new.

    Args:
        limit: int, how many are kept; those that were not used for longest go first.
    """

    def __init__(self, limit: int, known: tuple[KnownPrefix, ...] = ()):
        self.limit = limit
        self._known = list(known)  # the last is the most recently used

    def longest(self, token_ids: np.ndarray) -> KnownPrefix | None:
        """The longest that `token_ids` begin with."""
        found = [known for known in self._known if known.begins(token_ids)]
        if not found:
            return None
        longest = max(found, key=lambda known: len(known.token_ids))
        self.add(*longest)
        return longest

    def add(self, token_ids: np.ndarray, state: Mamba2State | None) -> None:
        """Keeps the `state` after `token_ids`."""
        others = [k for k in self._known if not np.array_equal(k.token_ids, token_ids)]
        self._known = [*others, KnownPrefix(token_ids, state)][-self.limit :]

    def copy(self) -> "KnownPrefixes":
        """Another collection of the same states, which never change."""
        return KnownPrefixes(self.limit, tuple(self._known))


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with both."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
