"""The rows of one running loop, and who has which."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops
from keras import tree

from keras_mamba2.generation import Generator
from keras_mamba2.host.rows import NO_TOKEN
from keras_mamba2.host.rows import NOT_FINITE
from keras_mamba2.host.rows import Rows
from keras_mamba2.serving.requests import NUM_LIKELY
from keras_mamba2.serving.requests import LikelyTokens
from keras_mamba2.state import Mamba2State

# So many times in a row fewer rows must have been enough, before there are fewer: to copy those
# that are kept takes about as long as a run with the others.
PATIENCE = 4


class Advanced(NamedTuple):
    """What one run of the loop did for one sequence."""

    owner: Any
    token_ids: np.ndarray
    likely: LikelyTokens | None
    has_stopped: bool
    is_finite: bool


@dataclasses.dataclass
class Place:
    """A row that somebody has."""

    owner: Any
    remaining: int
    stop_token_ids: np.ndarray


class Slots:
    """Places for sequences in one compiled loop. Sequences come and go while others go on.

    There are as many rows as are needed now, a power of two, since every row costs time whether it
    is used or not. The programs for each number of rows are compiled by `warm_up`, none later.

    Args:
        generator: the `Generator` of a model.
        most: int, how many sequences may run at once.
        max_tokens: int, how many tokens a sequence may have, prompt included. Attention reserves
            room for them; the state of a mixer has one size.
    """

    def __init__(self, generator: Generator, most: int, max_tokens: int):
        self.most = most
        self.generator = generator
        self.max_tokens = max_tokens
        self.reset()

    def reset(self) -> None:
        """Makes all places free, and new arrays."""
        self._rows = self._blank()
        self._places: list[Place | None] = [None]
        self._used_lately: collections.deque[int] = collections.deque(maxlen=PATIENCE)

    @property
    def num_likely(self) -> int:
        """Of how many tokens log probabilities are known in each place."""
        return min(NUM_LIKELY, self.generator.model.backbone.vocabulary_size)

    @property
    def num_rows(self) -> int:
        return len(self._places)

    @property
    def owners(self) -> list[Any]:
        return [place.owner for place in self._places if place is not None]

    @property
    def used(self) -> int:
        return len(self.owners)

    def insert(self, row: Rows, owner: Any) -> None:
        """Puts a sequence of `Generator.sequences` into a free place."""
        if not self.used and self.num_rows > 1:
            self.reset()  # it may be alone for long
        if self.used == self.num_rows:
            self._resize(range(self.num_rows), self._larger(self.num_rows))
            self._used_lately.clear()
        index = self._places.index(None)
        self._rows = self.generator.insert(self._now(), index, row)
        self._places[index] = Place(owner, int(row.remaining[0]), row.stop_token_ids[0])

    def release(self, owner: Any) -> None:
        """Frees the place of `owner`."""
        self._places[self._index(owner)] = None

    def state_of(self, owner: Any) -> Mamba2State:
        """The state of one sequence, a batch of one."""
        return self.generator.select(self._rows.state, [self._index(owner)])

    def advance(self, num_steps: int, asked: bool, meanwhile: Callable[[], None]) -> list[Advanced]:
        """At most `num_steps` tokens for each sequence. One that has stopped keeps its place.

        Args:
            num_steps: int.
            asked: bool, whether anyone asks for log probabilities.
            meanwhile: function, called while the device computes.
        """
        num_steps = min(num_steps, max(p.remaining for p in self._places if p is not None))
        rows, tokens, *likely = self._advance(self._now(), num_steps, asked)
        self._rows = Rows(*rows)
        meanwhile()
        tokens = ops.convert_to_numpy(tokens)
        likely = tree.map_structure(ops.convert_to_numpy, likely) if asked else []
        results = []
        for i, place in enumerate(self._places):
            if place is None:
                continue
            new = tokens[i, :num_steps]
            new = new[new != NO_TOKEN]
            is_finite = NOT_FINITE not in new[-1:]
            place.remaining -= len(new)
            if len(new) < num_steps or new[-1] in place.stop_token_ids or not is_finite:
                place.remaining = 0
            mine = (
                LikelyTokens(*(a[i, : len(new)] for a in tree.flatten(likely))) if asked else None
            )
            results.append(Advanced(place.owner, new, mine, place.remaining == 0, is_finite))
        return results

    def _advance(self, rows: Rows, num_steps: int, asked: bool):
        return self.generator.advance_telling(rows, num_steps, self.num_likely, asked)

    def shrink(self) -> None:
        """Leaves as many rows as were needed lately, if these are fewer."""
        self._used_lately.append(self.used)
        if len(self._used_lately) < PATIENCE:
            return
        needed = max(self._used_lately)
        while self.num_rows > 1 and needed <= self._smaller(self.num_rows):
            used = [i for i, place in enumerate(self._places) if place is not None]
            self._resize(used, self._smaller(self.num_rows))

    def warm_up(self) -> None:
        """Compiles all programs, the largest first: too little memory is known at once."""
        one, size = self._blank(), self.most
        while True:
            rows = self.generator.select(one, [0] * size)
            rows = self.generator.insert(rows, 0, one)
            rows, *_ = self._advance(rows, 1, asked=False)
            self.generator.select(Rows(*rows).state, [0])
            for other in {self._larger(size), self._smaller(size)}:
                self.generator.select(Rows(*rows), [0] * other)
            if size == 1:
                return
            size = self._smaller(size)

    def _blank(self) -> Rows:
        """A row that nobody has."""
        state = self.generator.empty_state(self.max_tokens)
        [row] = self.generator.sequences(state, np.zeros(1, "int32"), limit=0, temperature=0.0)
        return row

    def _index(self, owner: Any) -> int:
        return next(i for i, place in enumerate(self._places) if place and place.owner is owner)

    def _now(self) -> Rows:
        """The rows, of which those that nobody has do not run."""
        remaining = [0 if place is None else place.remaining for place in self._places]
        return self._rows._replace(remaining=np.array(remaining, "int32"))

    def _resize(self, kept, num_rows: int) -> None:
        """Goes on with the rows at `kept`, and with free ones up to `num_rows`."""
        free = num_rows - len(kept)
        self._rows = self.generator.select(self._now(), [*kept, *[0] * free])
        self._places = [*(self._places[i] for i in kept), *[None] * free]

    def _larger(self, num_rows: int) -> int:
        return min(2 * num_rows, self.most)

    def _smaller(self, num_rows: int) -> int:
        """The largest power of two below `num_rows`, at least 1."""
        return max(1 << (num_rows - 1).bit_length() >> 1, 1)
