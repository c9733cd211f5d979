"""What the engine is asked for, and what it delivers."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# How many of the likeliest tokens are known in each place; OpenAI's most.
NUM_LIKELY = 20


class LikelyTokens(NamedTuple):
    """The model's log probabilities, before temperature and filters, for n tokens."""

    logprobs: np.ndarray  # (n), of the tokens themselves
    top_ids: np.ndarray  # (n k), the likeliest tokens in their places
    top_logprobs: np.ndarray  # (n k)


class Delivery(NamedTuple):
    """New tokens of one sequence of a request, or its end."""

    sequence: int  # which of those of the request
    token_ids: np.ndarray  # (n)
    likely: LikelyTokens | None = None  # if the request asks for them
    finish_reason: str | None = None  # "stop" at a stop token, "length" at the limit
    error: Exception | None = None  # which has ended the sequence
    prompt_likely: LikelyTokens | None = None  # of the prompt after its first token, if asked for


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt, to be continued `count` times.

    Args:
        prompt: int32 array, at least one token id.
        limit: int, how many new tokens each sequence may get; 0 to score the prompt alone.
        parameters: of `FilterSampler`.
        deliver: function of a `Delivery`, called from the engine's thread; it must not wait.
        stop_token_ids: token ids that end a sequence, at most `STOP_TOKEN_CAPACITY`.
        seed: int, for the random numbers.
        count: int, the number of sequences.
        first: int, how many sequences of the same prompt other requests with this seed have.
            These are then others than those.
        with_likely: bool, whether log probabilities are delivered.
        scores_prompt: bool, whether those of the prompt are too, before anything else. All of it
            is read for that, since states do not know them; and none is kept.
        keep: how many tokens of the prompt other prompts are likely to begin with. States are
            kept there. `None` for all of it.
    """

    prompt: np.ndarray
    limit: int
    parameters: Mapping[str, float | None]
    deliver: Callable[[Delivery], None]
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    count: int = 1
    first: int = 0
    with_likely: bool = False
    scores_prompt: bool = False
    keep: tuple[int, ...] | None = None

    cached_tokens: int = dataclasses.field(default=0, init=False)  # known, and so not read
    cancelled: set[int] = dataclasses.field(default_factory=set, init=False)  # of its sequences

    @property
    def is_cancelled(self) -> bool:
        return len(self.cancelled) == self.count
