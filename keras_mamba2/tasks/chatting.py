from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_mamba2.generation import Decoding
from keras_mamba2.host.text_stream import TextStreams
from keras_mamba2.host.text_stream import run_lengths
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.state import Mamba2State
from keras_mamba2.state import files as state_files
from keras_mamba2.tasks.chat_options import ChatOptions
from keras_mamba2.tasks.mamba2_chat import Mamba2Chat


class Chatting:
    """The part of `Mamba2CausalLM` that answers: messages in, a reply out."""

    backbone: ResidualBackbone
    preprocessor: Any  # or None
    # Of `TextGeneration`.
    _decoding: Callable[..., Decoding]
    _streams: Callable[..., TextStreams]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
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
    ) -> str:
        """Answers a conversation, written as the checkpoint's own chat template writes it.

        Tokens are drawn as the arguments say, else by the sampler that the model was compiled
        with, else as the checkpoint's `generation_config.json` says: the likeliest, unless it has
        `do_sample`.

        Args:
            messages: list of dicts with `role` (`"system"`, `"user"`, `"assistant"`, `"tool"`) and
                `content`.
            tools: what the model may call: JSON schemas, or functions with type hints and a
                docstring in Google's form. A call stands in the reply, as the model writes it.
            max_new_tokens: int, how many tokens the reply has at most. Defaults to what the
                checkpoint says, or 1024.
            max_context: int, how many tokens conversation and reply have at most, together.
            stop_token_ids: token ids that end the reply. `"auto"` is the tokenizer's end token and
                those that `generation_config.json` names.
            stop_strings: as in `generate`, like the following.
            seed: as there.
            temperature: as there.
            top_k: as there.
            top_p: as there.
            min_p: as there.
            repetition_penalty: as there.
            template_variables: dict, what else the template reads, such as `documents` or
                `enable_thinking`.

        Returns:
            The text of the reply, without control tokens.

        Raises:
            ValueError: before any token is made: for a model without a chat template, messages
                that it refuses, a conversation longer than `max_context`, and as `generate`.

        Example:
        ```python
        lm.chat([{"role": "user", "content": "What is a state space model?"}])
        ```
        """
        pieces = self.stream_chat(
            messages,
            tools,
            max_new_tokens=max_new_tokens,
            max_context=max_context,
            stop_token_ids=stop_token_ids,
            stop_strings=stop_strings,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            template_variables=template_variables,
        )
        return "".join(pieces)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """As `chat`, piece by piece. The iterator can be left at any time.

        Raises:
            ValueError: as `chat`, before the first piece is asked for.
        """
        checked = ChatOptions.checked(self, **options)
        prompt = self.preprocessor.chat_prompt(messages, tools, **checked.template_variables)
        return (piece for [piece] in self.stream_reply(prompt, checked))

    def start_chat(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> Mamba2Chat:
        """A conversation that keeps the states after its turns: a turn costs what is new in it.

        Args:
            system: string, what the model is told before the first turn.
            tools: as in `chat`.
            messages: list of dicts, a conversation to go on with.
            **options: of `chat`, for all turns.
        """
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        return Mamba2Chat(self, messages, tools, **options)

    def resume_chat(self, file, **options: Any) -> Mamba2Chat:
        """The conversation that `Mamba2Chat.save` wrote to `file`.

        Args:
            file: path.
            **options: of `chat`, for all turns.

        Raises:
            ValueError: that names the file, if it is missing, damaged, that of another model, or
                no conversation.
        """
        *parts, text = state_files.load(file, self.backbone)
        return Mamba2Chat.restored(self, text, Mamba2State(*parts), file, **options)

    def stream_reply(
        self,
        prompt: np.ndarray,
        options: ChatOptions,
        before: np.ndarray | None = None,
        state: Mamba2State | None = None,
    ) -> TextStreams:
        """The reply to token ids, that go on from the ids `before` and the state after them."""
        seen = 0 if before is None else len(before)
        limits = np.array([options.room(seen + len(prompt))])
        generation = options.generation._replace(state=state)
        history = None if before is None else [before]
        decoding = self._decoding([prompt], limits, generation, run_lengths(), history=history)
        control = self.preprocessor.tokenizer.control_token_ids
        # A reply is a text of its own, and what ends it is no part of it.
        skip = (*control, *generation.stop_token_ids)
        return self._streams(decoding, generation, [prompt[:0]], skip)
