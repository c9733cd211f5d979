"""Requests of OpenAI's API: what is served, within which limits, and what is refused."""

from typing import Annotated
from typing import Any
from typing import ClassVar

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import field_validator
from pydantic import model_validator

MOST_STOPS = 4
MOST_PROMPTS = 32
MOST_LIKELY = 5  # of completions; 20 of chats, in OpenAI's API

Text = Annotated[str, Field(max_length=10_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=1_000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# The first that is none ends it: a long list of texts would be as many errors.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Generation(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # What OpenAI has and this server has not, with the values that ask for nothing.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
    }
    # What says something about the request, and nothing about the answer.
    ignored: ClassVar[tuple[str, ...]] = (
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    )

    model: str
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    n: int | None = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    # Not OpenAI's, but of most servers of open models.
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1, le=100)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in cls.unsupported.items():
            value = data.get(name)
            if value is not None and not any(_same(value, other) for other in neutral):
                raise ValueError(f"`{name}` is not supported by this server. Leave it out.")
        left_out = {*cls.unsupported, *cls.ignored}
        asked = {name: value for name, value in data.items() if name not in left_out}
        unknown = [n for n in asked if n not in cls.model_fields and asked[n] is not None]
        # One is enough for an error: each would be one of its own.
        return {n: asked[n] for n in asked if n in cls.model_fields or n in unknown[:1]}

    @field_validator("stop")
    @classmethod
    def _as_list(cls, stop: str | list[str] | None) -> list[str]:
        return [stop] if isinstance(stop, str) else stop or []

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` are for `stream: true`.")
        return self

    @property
    def num_likely(self) -> int | None:
        """How many of the likeliest tokens are asked for; `None` for no log probabilities."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> list[str]:
        return list(self.stop or [])

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters of `FilterSampler` that were given."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given.get("top_p") == 0:  # nothing but the likeliest
            given |= {"temperature": 0.0, "top_p": 1.0}
        return given


class CompletionRequest(Generation):
    """Of `/v1/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Generation.unsupported,
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as a list in any case."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt  # type: ignore[return-value]

    @property
    def num_likely(self) -> int | None:
        return self.logprobs

    @property
    def max_new_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt is told with its log probabilities, or without any new token."""
        return bool(self.echo) and (self.logprobs is not None or self.max_new_tokens == 0)

    @model_validator(mode="after")
    def _check_echo(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens: 0` asks for nothing, unless `echo` asks for the prompt.")
        return self


class ChatRequest(Generation):
    """Of `/v1/chat/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Generation.unsupported,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_likely(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _check_logprobs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` need `logprobs: true`.")
        return self


def _same(value: Any, other: Any) -> bool:
    """Equal, and a bool only if both are."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
