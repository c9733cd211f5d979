"""What `chat` is asked for, and what the checkpoint says where it is not asked for anything."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import optional
from keras_mamba2.generation import sampling_of
from keras_mamba2.host.sampling import with_given
from keras_mamba2.tasks.generation_options import GenerationOptions

MOST_NEW_TOKENS = 1024
TOP_K = 50  # of transformers, where a checkpoint samples and does not say
# Arguments of `ChatTemplate.render` that have others to say what they are.
RESERVED = ("self", "messages", "tools", "add_generation_prompt", "name")


class ChatOptions(NamedTuple):
    """The arguments of `Mamba2CausalLM.chat` with their defaults filled in."""

    generation: GenerationOptions
    max_context: int | None
    template_variables: dict[str, Any]

    @classmethod
    def checked(
        cls,
        lm,
        *,
        max_new_tokens: int | None = None,
        max_context: int | None = None,
        stop_token_ids: Sequence[int] | str | None = "auto",
        stop_strings: Sequence[str] | str | None = (),
        seed: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> "ChatOptions":
        if lm.preprocessor is None:
            raise ValueError(
                "A conversation is text, which needs a `preprocessor`. Received: preprocessor=None"
            )
        lm.preprocessor.chat_template  # noqa: B018  raises for a model that has none
        defaults = lm.preprocessor.generation_defaults
        if max_new_tokens is None:
            max_new_tokens = defaults.get("max_new_tokens", MOST_NEW_TOKENS)
        if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
            stop_token_ids = _stop_tokens(lm, defaults)
        given = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        parameters = _sampling(lm, defaults, given)
        sampling_of(lm.sampler, 1, **parameters)  # raises, before anything is read
        generation = GenerationOptions.checked(
            lm,
            max_length=None,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            stop_strings=stop_strings,
            state=None,
            seed=seed,
            **parameters,
        )
        max_context = optional(SIZE)("max_context", max_context)
        return cls(generation, max_context, _checked_variables(template_variables))

    def room(self, num_tokens: int) -> int:
        """How many tokens a reply may have after `num_tokens`.

        Raises:
            ValueError: if there is no room for any.
        """
        limit = self.generation.max_new_tokens or MOST_NEW_TOKENS
        if self.max_context is None:
            return limit
        if num_tokens >= self.max_context:
            raise ValueError(
                f"The conversation has {num_tokens} tokens, which leaves no room for a reply. Pass "
                "a larger `max_context`, take turns back with `undo`, or start anew. "
                f"Received: max_context={self.max_context}"
            )
        return min(limit, self.max_context - num_tokens)


def _checked_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(variables, Mapping | None):
        raise ValueError(
            f"`template_variables` must be a dict. Received: template_variables={variables!r}"
        )
    for name in variables or ():
        if not isinstance(name, str) or name in RESERVED:
            raise ValueError(
                "The names of template variables must be strings, and none of "
                f"{', '.join(RESERVED)}, which a conversation sets itself. Received: {name!r}"
            )
    return dict(variables or {})


def _stop_tokens(lm, defaults: Mapping[str, Any]) -> tuple[int, ...]:
    """The end token, and those by which the checkpoint ends a turn."""
    named = defaults.get("eos_token_id", ())
    ids = [lm.preprocessor.tokenizer.end_token_id]
    ids += named if isinstance(named, Iterable) else [named]
    size = lm.backbone.vocabulary_size
    return tuple(dict.fromkeys(id for id in ids if id is not None and 0 <= id < size))


def _sampling(lm, defaults: Mapping[str, Any], given: Mapping[str, float | None]) -> dict[str, Any]:
    """The parameters of sampling: those given, of a sampler compiled with, of the checkpoint."""
    given = {name: value for name, value in given.items() if value is not None}
    if lm.has_own_sampler:
        return given
    everything = lm.backbone.vocabulary_size
    found: dict[str, float | None] = {
        "temperature": 0.0,
        "top_k": everything,
        "repetition_penalty": defaults.get("repetition_penalty"),
    }
    if defaults.get("do_sample"):
        found["temperature"] = defaults.get("temperature", 1.0)
        found["top_k"] = defaults.get("top_k", TOP_K) or everything
        found |= {name: defaults.get(name) for name in ("top_p", "min_p")}
    return with_given(found, given)
