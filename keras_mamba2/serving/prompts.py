"""From requests of the API to prompts of the engine, and the streams that make texts of tokens."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_mamba2.generation import row_parameters
from keras_mamba2.host.text_stream import TextStream
from keras_mamba2.host.text_stream import text_after
from keras_mamba2.serving.openai_types import ChatRequest
from keras_mamba2.serving.openai_types import CompletionRequest
from keras_mamba2.tasks.chat_options import MOST_NEW_TOKENS
from keras_mamba2.tasks.chat_options import ChatOptions
from keras_mamba2.tasks.known_prefixes import common_length

# OpenAI's.
COMPLETION_DEFAULTS: dict[str, float | None] = {"temperature": 1.0, "top_p": 1.0}
# Tokens of prompts that one answer tells with log probabilities, each in about a kilobyte.
MOST_TOLD = 2**18


@dataclasses.dataclass
class Prompt:
    """What is to be continued, and how."""

    token_ids: np.ndarray
    text: str  # what `echo` repeats
    scores: bool  # whether it is told with its log probabilities
    limit: int
    parameters: dict[str, Any]
    stop_token_ids: tuple[int, ...]
    skip: tuple[int, ...]  # token ids that are no text
    stop_strings: tuple[str, ...]
    keep: tuple[int, ...] | None = None  # as of `Request`
    is_continued: bool = True  # by a text; a reply is a text of its own


class Prompts:
    """Reads requests for one model.

    Args:
        lm: a `Mamba2CausalLM` with a preprocessor.
        max_tokens: int, how many tokens a sequence may have.

    Raises:
        ValueError: for a model without a preprocessor, and one that chats with a sampler whose
            parameters a row cannot have for itself.
    """

    def __init__(self, lm, max_tokens: int):
        if lm.preprocessor is None:
            raise ValueError("A server reads text: it needs a model with a `preprocessor`.")
        if lm.preprocessor.tokenizer.chat_template is not None:
            row_parameters(lm.sampler)  # raises now, and not for every conversation
        self._lm = lm
        self._max_tokens = max_tokens
        self._tokenizer = lm.preprocessor.tokenizer
        self._token_texts: dict[int, str] = {}
        self._letter = np.array(self._tokenizer("a"), "int32")

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.chat_template is not None

    def of_completion(self, body: CompletionRequest) -> list[Prompt]:
        """The prompts of a request, in its order.

        Raises:
            ValueError: for text that is no UTF-8, ids outside the vocabulary, and more log
                probabilities of prompts than one answer should have.
        """
        read = list(map(self._read, body.prompts))
        told = sum(len(token_ids) for token_ids, _ in read) * body.count
        if body.scores_prompt and body.num_likely is not None and told > MOST_TOLD:
            raise ValueError(
                f"An answer can have log probabilities of {MOST_TOLD} tokens of prompts. Received: "
                f"{told}, with `n` counted. Ask for fewer prompts or choices at once."
            )
        end = self._tokenizer.end_token_id
        stop_token_ids = () if end is None else (end,)
        return [
            Prompt(
                token_ids=token_ids,
                text=text,
                scores=body.scores_prompt,
                limit=body.max_new_tokens,
                parameters={**COMPLETION_DEFAULTS, **body.sampling},
                stop_token_ids=stop_token_ids,
                skip=(*stop_token_ids, *self._tokenizer.special_token_ids),
                stop_strings=tuple(body.stop_strings),
            )
            for token_ids, text in read
        ]

    def of_chat(self, body: ChatRequest) -> Prompt:
        """The prompt of a conversation, written by the model's own template.

        Raises:
            ValueError: for a model without a template, and messages that it refuses.
        """
        messages = [_plain(message) for message in body.messages]
        variables = body.chat_template_kwargs or {}
        options = ChatOptions.checked(
            self._lm,
            max_new_tokens=body.max_new_tokens,
            stop_strings=body.stop_strings,
            template_variables=variables,
            **body.sampling,
        )
        generation = options.generation
        token_ids = self._write(messages, variables)
        limit = generation.max_new_tokens or MOST_NEW_TOKENS
        if body.max_new_tokens is None:  # as much as there is room for
            limit = max(min(limit, self._max_tokens - len(token_ids)), 1)
        stops = generation.stop_token_ids
        skip = (*stops, *self._tokenizer.special_token_ids, *self._tokenizer.control_token_ids)
        return Prompt(
            token_ids=token_ids,
            text="",
            scores=False,
            limit=limit,
            parameters=row_parameters(self._lm.sampler, **generation.parameters),
            stop_token_ids=stops,
            skip=skip,
            stop_strings=generation.stop_strings,
            keep=self._likely_beginnings(messages, variables, token_ids),
            is_continued=False,
        )

    def stream(self, prompt: Prompt) -> TextStream:
        before = prompt.token_ids if prompt.is_continued else ()
        return TextStream(self._tokenizer.detokenize, prompt.skip, prompt.stop_strings, before)

    def token_text(self, token_id: int) -> str:
        """A token within a text; where it is part of a character, with the replacement character.

        At the beginning of a text, some tokenizers strip a blank.
        """
        if token_id not in self._token_texts:
            decode = self._tokenizer.detokenize
            self._token_texts[token_id] = text_after(self._letter, [token_id], decode)
        return self._token_texts[token_id]

    def offsets(self, prompt: Prompt) -> list[int]:
        """Where in the text of a prompt each of its tokens begins.

        Tokens that stand before a text, and are no part of it, begin at 0.
        """
        stream, position, offsets = TextStream(self._tokenizer.detokenize, (), ()), 0, []
        for token_id in prompt.token_ids.tolist():
            offsets.append(position)
            position += len(stream.push([token_id]))
        before = position + len(stream.finish()) - len(prompt.text)
        return [min(max(offset - before, 0), len(prompt.text)) for offset in offsets]

    def _read(self, prompt: str | list[int]) -> tuple[np.ndarray, str]:
        if isinstance(prompt, str):
            check_unicode("prompt", prompt)
            return self._lm.preprocessor.prompts([prompt])[0], prompt
        size = self._lm.num_tokens
        if wrong := [token_id for token_id in prompt if token_id >= size]:
            raise ValueError(f"Token id {wrong[0]} is none: this model has {size} tokens.")
        return np.array(prompt, "int32"), self._tokenizer.detokenize(prompt)

    def _write(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], **options: Any
    ) -> np.ndarray:
        return self._lm.preprocessor.chat_prompt(messages, **options, **variables)

    def _likely_beginnings(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any], token_ids: np.ndarray
    ) -> tuple[int, ...]:
        """How long what other conversations begin with is, and the same one at its next turn."""
        system = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
        found = []
        for begun in (messages[:system], messages):
            try:
                written = self._write(begun, variables, add_generation_prompt=False)
            except ValueError:  # some templates want a user's message
                continue
            found.append(common_length(written, token_ids))
        return tuple(found)


def check_unicode(name: str, text: str) -> None:
    """Raises for half of a surrogate pair, which JSON can write, and which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` is no UTF-8: {error}") from None


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its parts of text as one, and the role that a template knows."""
    message = {**message}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "".join(map(_part, content))
    if message.get("role") == "developer":
        message["role"] = "system"
    for name, value in message.items():
        if isinstance(value, str):
            check_unicode(name, value)
    return message


def _part(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise ValueError(f"The parts of a message can only be text. Received: {kind!r}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"The `text` of a part must be a string. Received: {text!r}")
    return text
