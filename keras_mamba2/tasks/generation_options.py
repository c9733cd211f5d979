"""The arguments of `generate` and `stream`, checked before any work is done."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.host.options import checked_lengths
from keras_mamba2.host.options import checked_stop_ids
from keras_mamba2.host.options import checked_stop_strings
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
        total, max_new_tokens = checked_lengths(max_length, max_new_tokens)
        preprocessor = model.preprocessor
        return cls(
            max_length=total,
            max_new_tokens=max_new_tokens,
            stop_token_ids=checked_stop_ids(
                stop_token_ids, model.backbone.vocabulary_size, _end_tokens(preprocessor)
            ),
            stop_strings=checked_stop_strings(stop_strings, preprocessor is not None),
            num_return_sequences=SIZE("num_return_sequences", num_return_sequences),
            state=optional(STATE)("state", state),
            seed=optional(integer())("seed", seed),
            parameters=parameters,
        )


def _end_tokens(preprocessor) -> tuple[int, ...] | None:
    if preprocessor is None:
        return None
    end_token_id = preprocessor.tokenizer.end_token_id
    return () if end_token_id is None else (end_token_id,)
