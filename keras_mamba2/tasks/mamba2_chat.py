import copy
import json
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_mamba2.chat.template import checked_messages
from keras_mamba2.chat.template import checked_tools
from keras_mamba2.host.conversations import KIND
from keras_mamba2.host.conversations import conversation_of
from keras_mamba2.host.rows import NO_TOKEN
from keras_mamba2.host.text_stream import LastStream
from keras_mamba2.host.text_stream import TextStreams
from keras_mamba2.tasks.chat_options import ChatOptions
from keras_mamba2.tasks.known_prefixes import KnownPrefix
from keras_mamba2.tasks.known_prefixes import KnownPrefixes
from keras_mamba2.tasks.known_prefixes import common_length
from keras_mamba2.untrusted import shortened

# Two a turn: before the reply, and after it.
KEPT_STATES = 8
NOTHING = KnownPrefix(np.zeros(0, "int32"), None)


class ChatUsage(NamedTuple):
    """How many tokens a turn had to do with."""

    prompt_tokens: int  # of the whole conversation, as the template wrote it
    cached_tokens: int  # of these, how many were not read again
    new_tokens: int  # of the reply, its end included


class Mamba2Chat:
    """A conversation, and the states after its turns, so that a turn costs what is new in it.

    Each turn, the template writes the whole conversation anew. Its tokens are compared with those
    that a state has seen, and what they have in common is not read again. Most templates only
    append. One that changes what it wrote before, such as dropping the reasoning of old turns, has
    the conversation read again from the last turn that is still the same.

    Made by `Mamba2CausalLM.start_chat` and `Mamba2CausalLM.resume_chat`. The reply is that of
    `Mamba2CausalLM.chat` for all messages, up to rounding.

    Args:
        lm: a `Mamba2CausalLM` whose tokenizer has a chat template.
        messages: list of dicts with `role` and `content`, the conversation so far.
        tools: what the model may call, as in `Mamba2CausalLM.chat`.
        **options: of `Mamba2CausalLM.chat`, for all turns.

    Example:
    ```python
    chat = lm.start_chat(system="You are a helpful assistant.")
    chat.send("What is a state space model?")
    other = chat.fork()
    for piece in chat.stream("Shorter, please."):
        print(piece, end="")
    other.send("And in French?")
    chat.undo()
    chat.save("chat.safetensors")
    chat = lm.resume_chat("chat.safetensors")
    ```
    """

    def __init__(
        self,
        lm,
        messages: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        **options: Any,
    ):
        self.lm = lm
        self.tools = checked_tools(tools)
        self.options = options
        self.usage: ChatUsage | None = None
        self._messages = checked_messages(messages) if len(messages) else []
        self._known = KnownPrefixes(KEPT_STATES)
        self._last = LastStream()
        ChatOptions.checked(lm, **options)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation."""
        return copy.deepcopy(self._messages)

    def send(
        self, message: str | Mapping[str, Any] | Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """Says something, and returns the reply.

        Args:
            message: what the user says, or a message such as a tool's result, or a list of these.
            **options: of `Mamba2CausalLM.chat`, for this turn.
        """
        return "".join(self.stream(message, **options))

    def stream(
        self, message: str | Mapping[str, Any] | Sequence[Mapping[str, Any]], **options: Any
    ) -> Iterator[str]:
        """As `send`, piece by piece. Left early, the reply is what was given of it.

        It ends, if it is still open, where the next turn begins or the last is taken back.

        Raises:
            ValueError: as `Mamba2CausalLM.chat`, before the first piece is asked for. The
                conversation then stays as it was, but for an open reply, which ends.
        """
        checked = ChatOptions.checked(self.lm, **{**self.options, **options})
        new = _checked(message)
        self._last.close()
        messages = [*self._messages, *new]
        prompt, known, cached = self._read(messages, checked)
        streams = self.lm.stream_reply(
            prompt[len(known.token_ids) :], checked, known.token_ids, known.state
        )
        return self._last.hand_out(self._collect(messages, prompt, cached, streams))

    def _read(
        self, messages: list[dict[str, Any]], options: ChatOptions
    ) -> tuple[np.ndarray, KnownPrefix, int]:
        """Reads a conversation up to where the reply's heading begins, and keeps the state there.

        Returns:
            The tokens of all of it, what a state has seen of them now, and how many before.
        """
        write = self.lm.preprocessor.chat_prompt
        variables = options.template_variables
        prompt = write(messages, self.tools, **variables)
        options.room(len(prompt))  # raises, before anything is read
        turn = write(messages, self.tools, add_generation_prompt=False, **variables)
        known = self._known.longest(prompt) or NOTHING
        cached = len(known.token_ids)
        # What comes next will share it, also where a template drops what the reply begins with.
        read = common_length(turn, prompt)
        if read > cached:
            known = self._after(prompt[:read], known)
            self._known.add(*known)
        return prompt, known, cached

    def _after(self, token_ids: np.ndarray, known: KnownPrefix) -> KnownPrefix:
        """The state after `token_ids`, read from where it is known."""
        new = token_ids[None, len(known.token_ids) :]
        inputs = {"token_ids": new, "padding_mask": np.ones_like(new)}
        return KnownPrefix(token_ids, self.lm.prefill(inputs, known.state))

    def _collect(
        self,
        messages: list[dict[str, Any]],
        prompt: np.ndarray,
        cached: int,
        streams: TextStreams,
    ) -> Generator[str]:
        text, is_over = "", False
        try:
            for [piece] in streams:
                text += piece
                yield piece
            is_over = True
        finally:
            [new] = streams.decoding.tokens()
            # Behind a stop string, the loop is ahead of the text.
            if is_over and not streams.streams[0].stopped:
                self._known.add(np.concatenate([prompt, new]), streams.decoding.rows.state)
            if is_over or text:
                self._messages = [*messages, {"role": "assistant", "content": text}]
            self.usage = ChatUsage(len(prompt), cached, len(new))

    def undo(self) -> list[dict[str, Any]]:
        """Takes back the last turn: what the user said last, and all that followed.

        Returns:
            The messages that were taken back.

        Raises:
            ValueError: if the user has not said anything yet.
        """
        self._last.close()
        users = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        if not users:
            raise ValueError("There is no turn to take back: the user has not said anything.")
        taken, self._messages = self._messages[users[-1] :], self._messages[: users[-1]]
        return taken

    def fork(self) -> "Mamba2Chat":
        """An independent conversation that goes on from here. Costs nothing."""
        other = Mamba2Chat(self.lm, self._messages, self.tools, **self.options)
        other._known = self._known.copy()
        return other

    def save(self, file) -> None:
        """Writes messages, tools and the state to a file, for `Mamba2CausalLM.resume_chat`.

        Options are not among it.

        Raises:
            ValueError: if nothing has been said yet.
        """
        if not self._messages:
            raise ValueError("There is nothing to save yet: nothing has been said.")
        variables = self.options.get("template_variables") or {}
        tokens = self.lm.preprocessor.chat_prompt(
            self._messages, self.tools, add_generation_prompt=False, **variables
        )
        known = self._known.longest(tokens) or self._after(tokens, NOTHING)
        conversation = {
            "kind": KIND,
            "messages": self._messages,
            "tools": self.tools,
            "token_ids": known.token_ids.tolist(),
        }
        assert known.state is not None  # a conversation has tokens, and they were read
        known.state.save(file, self.lm.backbone, json.dumps(conversation))

    @classmethod
    def restored(cls, lm, text: str, state, file, **options: Any) -> "Mamba2Chat":
        """A conversation from what `save` wrote."""
        stored = conversation_of(text)
        if stored is None:
            raise ValueError(
                f"{file} holds a text, not a conversation. `lm.resume` goes on with a text."
            )
        try:
            messages = checked_messages(stored.get("messages"))
            tools = checked_tools(stored.get("tools"))
            token_ids = _tokens_behind(state, stored.get("token_ids"))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file} holds no whole conversation: {error}") from error
        chat = cls(lm, messages, tools, **options)
        chat._known.add(token_ids, state)
        return chat

    def __repr__(self) -> str:
        return f"Mamba2Chat({len(self._messages)} messages)"


def _tokens_behind(state, token_ids: Any) -> np.ndarray:
    """The tokens that a state has seen, if they are as many."""
    found = np.array(token_ids, "int32")
    seen = ops.convert_to_numpy(state.length) + (ops.convert_to_numpy(state.token) != NO_TOKEN)
    if found.ndim != 1 or seen.tolist() != [len(found)]:
        raise ValueError(f"its state has seen {seen.tolist()} tokens, not {shortened(token_ids)}.")
    return found


def _checked(message) -> list[dict[str, Any]]:
    """What is said, as messages."""
    if isinstance(message, str):
        message = {"role": "user", "content": message}
    return checked_messages([message] if isinstance(message, Mapping) else message)
