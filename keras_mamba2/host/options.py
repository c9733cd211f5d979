"""What `generate` and `stream` take, checked before any work is done."""

from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import did_you_mean
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from keras_mamba2.host.sampling import KINDS

# Of `stream`, but for the text and the state, which a session has.
OF_SESSIONS = ("max_length", "max_new_tokens", "stop_token_ids", "stop_strings", "seed", *KINDS)


def check_session_options(names: Iterable[str]) -> None:
    """Refuses what a session's `generate` and `stream` do not take."""
    for name in names:
        if name not in OF_SESSIONS:
            raise ValueError(
                f"A session does not take `{name}`.{did_you_mean(name, OF_SESSIONS)} It takes "
                f"{', '.join(OF_SESSIONS)}."
            )


def checked_lengths(
    max_length: int | None, max_new_tokens: int | None
) -> tuple[int | None, int | None]:
    """The two, of which one may be given at most."""
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(
            "Pass `max_length`, the total length, or `max_new_tokens`, not both. "
            f"Received: max_length={max_length}, max_new_tokens={max_new_tokens}"
        )
    total = optional(SIZE)("max_length", max_length)
    return total, optional(SIZE)("max_new_tokens", max_new_tokens)


def row_limits(
    prompts: Sequence[np.ndarray], total: int | None, max_new_tokens: int | None
) -> np.ndarray:
    """How many tokens may follow each prompt."""
    if total is None:
        return np.full(len(prompts), max_new_tokens)
    for i, prompt in enumerate(prompts):
        if len(prompt) > total:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens, more than the total length of {total}. "
                "Pass a larger `max_length`, or `max_new_tokens` instead."
            )
    return np.array([total - len(prompt) for prompt in prompts])


def checked_stop_strings(
    stop_strings: Sequence[str] | str | None, has_text: bool
) -> tuple[str, ...]:
    """Stop strings as a tuple, for a model that writes text or does not."""
    if stop_strings is None:
        return ()
    is_one = isinstance(stop_strings, str) or not isinstance(stop_strings, Iterable)
    stop_strings = several(STRING)(
        "stop_strings", (stop_strings,) if is_one else tuple(stop_strings)
    )
    if not all(stop_strings):
        raise ValueError("A stop string is empty. Pass `stop_strings=()` for none.")
    if stop_strings and not has_text:
        raise ValueError("`stop_strings` need text, and so a `preprocessor`.")
    return stop_strings


def checked_stop_ids(
    stop_token_ids: Sequence[int] | str | None,
    vocabulary_size: int,
    end_token_ids: Sequence[int] | None,
) -> tuple[int, ...]:
    """Stop tokens as a tuple; "auto" are the `end_token_ids`, None without a tokenizer."""
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if end_token_ids is None:
            raise ValueError(
                'A `preprocessor` must be attached to the model if `stop_token_ids="auto"`. '
                "Currently `preprocessor=None`. Pass `stop_token_ids=None` to generate until "
                "`max_length`, or the ids of tokens that end a row."
            )
        return tuple(end_token_ids)
    if isinstance(stop_token_ids, str) or not isinstance(stop_token_ids, Iterable):
        raise ValueError(
            '`stop_token_ids` must be "auto", None or a sequence of token ids. '
            f"Received: {stop_token_ids!r}"
        )
    token_id = integer(at_least=0, at_most=vocabulary_size - 1)
    return several(token_id)("stop_token_ids", tuple(stop_token_ids))
