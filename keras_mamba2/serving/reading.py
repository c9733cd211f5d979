"""A prompt on its way into a state, piece by piece."""

import time

import numpy as np

from keras_mamba2.generation import Generator
from keras_mamba2.host.decoding import NOT_FINITE_REASON
from keras_mamba2.host.rows import Rows
from keras_mamba2.serving.prefix_cache import PrefixCache
from keras_mamba2.serving.requests import LikelyTokens
from keras_mamba2.serving.requests import Request


class Reading:
    """Reads the prompt of one request, from where a state is known.

    Args:
        request: `Request`.
        generator: the `Generator` of the model.
        cache: `PrefixCache`, where reading begins, and where states are kept on the way.
        max_tokens: int, how many tokens the state has room for.
        num_likely: int, of how many tokens log probabilities are known in each place.
    """

    def __init__(
        self,
        request: Request,
        generator: Generator,
        cache: PrefixCache,
        max_tokens: int,
        num_likely: int,
    ):
        self.request = request
        self.begun = time.perf_counter()
        self._generator = generator
        self._cache = cache
        # The last token is read by the loop.
        self._end = len(request.prompt) - 1
        self._num_likely = num_likely
        self._scores = [no_scores(num_likely)]
        self._position = 0
        self._keep: set[int] = set()
        if request.scores_prompt:
            self._state = generator.empty_state(max_tokens)
        else:
            self._begin_at_known(max_tokens)

    def _begin_at_known(self, max_tokens: int) -> None:
        request, cache = self.request, self._cache
        known = cache.longest(request.prompt[: self._end])
        if known is None:
            self._state = self._generator.empty_state(max_tokens)
        else:
            self._position = len(known.token_ids)
            self._state = self._generator.restored(known.state, max_tokens)
        request.cached_tokens = self._position
        keep = (self._end,) if request.keep is None else request.keep
        keep = (*keep, cache.meeting(request.prompt))
        self._keep = {min(k, self._end) for k in keep if k > self._position}

    @property
    def left(self) -> int:
        """How many tokens are still to be read."""
        return self._end - self._position

    def read(self, block: int) -> None:
        """Reads at most `block` tokens."""
        ends = {self._position + block, self._end, *self._keep}
        end = min(e for e in ends if e > self._position)
        piece = self.request.prompt[self._position : end]
        if self.request.scores_prompt:
            self._score(piece, self.request.prompt[self._position + 1 : end + 1])
        else:
            self._state = self._generator.read(self._state, piece)
        self._position = end
        if end in self._keep and self.left:  # the next block takes the state's memory
            self._cache.add(self.request.prompt[:end], self._state)

    def remember(self) -> None:
        """Keeps the state after all that was read, if it is to be kept."""
        if self._end in self._keep:
            self._cache.add(self.request.prompt[: self._end], self._state)

    def _score(self, piece: np.ndarray, targets: np.ndarray) -> None:
        self._state, *found = self._generator.read_scoring(
            self._state, piece, targets, self._num_likely
        )
        scores = LikelyTokens(*found)
        if not (np.isfinite(scores.logprobs).all() and np.isfinite(scores.top_logprobs).all()):
            raise ValueError(f"The logits are not finite. {NOT_FINITE_REASON}")
        self._scores.append(scores)

    @property
    def scores(self) -> LikelyTokens | None:
        """Of what was read, if the request asks for them."""
        if not self.request.scores_prompt:
            return None
        return LikelyTokens(*map(np.concatenate, zip(*self._scores, strict=True)))

    def sequences(self) -> list[Rows]:
        """The rows that go on, when nothing is left."""
        request = self.request
        return self._generator.sequences(
            self._state,
            request.prompt,
            request.limit,
            request.stop_token_ids,
            request.count,
            request.seed,
            request.first,
            **request.parameters,
        )


def no_scores(num_likely: int) -> LikelyTokens:
    """Of no tokens."""
    return LikelyTokens(
        np.zeros(0, "float32"),
        np.zeros((0, num_likely), "int32"),
        np.zeros((0, num_likely), "float32"),
    )
