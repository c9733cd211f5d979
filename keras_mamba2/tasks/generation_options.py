"""The arguments of `generate` and `stream`, checked before any work is done."""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import STRING
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.arguments import several
from keras_mamba2.state import STATE
from keras_mamba2.state import Mamba2State


class GenerationOptions(NamedTuple):
    """The arguments of `Mamba2CausalLM.generate` with their defaults filled in."""

    max_length: int | None
    max_new_tokens: int | None
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    num_return_sequences: int
    state: Mamba2State | None
    seed: int | None
    parameters: dict[str, Any]  # of `FilterSampler`; None for the sampler's own value

    @classmethod
    def checked(
        cls,
        model,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        stop_strings: Sequence[str] | str | None = (),
        state: Mamba2State | None = None,
        seed: int | None = None,
        num_return_sequences: int = 1,
        **parameters: float | None,
    ) -> "GenerationOptions":
        if max_new_tokens is not None and max_length is not None:
            raise ValueError(
                "Pass `max_length`, the total length, or `max_new_tokens`, not both. "
                f"Received: max_length={max_length}, max_new_tokens={max_new_tokens}"
            )
        return cls(
            max_length=optional(SIZE)("max_length", max_length),
            max_new_tokens=optional(SIZE)("max_new_tokens", max_new_tokens),
            stop_token_ids=_stop_token_ids(stop_token_ids, model),
            stop_strings=_stop_strings(stop_strings, model.preprocessor),
            num_return_sequences=SIZE("num_return_sequences", num_return_sequences),
            state=optional(STATE)("state", state),
            seed=optional(integer())("seed", seed),
            parameters=parameters,
        )


def _stop_strings(stop_strings, preprocessor) -> tuple[str, ...]:
    if stop_strings is None:
        return ()
    is_one = isinstance(stop_strings, str) or not isinstance(stop_strings, Iterable)
    stop_strings = (stop_strings,) if is_one else tuple(stop_strings)
    several(STRING)("stop_strings", stop_strings)
    if not all(stop_strings):
        raise ValueError("A stop string is empty. Pass `stop_strings=()` for none.")
    if stop_strings and preprocessor is None:
        raise ValueError("`stop_strings` need text, and so a `preprocessor`.")
    return stop_strings


def _stop_token_ids(stop_token_ids, model) -> tuple[int, ...]:
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        return _end_tokens(model.preprocessor)
    if isinstance(stop_token_ids, str) or not isinstance(stop_token_ids, Iterable):
        raise ValueError(
            '`stop_token_ids` must be "auto", None or a sequence of token ids. '
            f"Received: {stop_token_ids!r}"
        )
    token_id = integer(at_least=0, at_most=model.backbone.vocabulary_size - 1)
    return several(token_id)("stop_token_ids", tuple(stop_token_ids))


def _end_tokens(preprocessor) -> tuple[int, ...]:
    if preprocessor is None:
        raise ValueError(
            'A `preprocessor` must be attached to the model if `stop_token_ids="auto"`. '
            "Currently `preprocessor=None`. Pass `stop_token_ids=None` to generate until "
            "`max_length`, or the ids of tokens that end a row."
        )
    end_token_id = preprocessor.tokenizer.end_token_id
    return () if end_token_id is None else (end_token_id,)
