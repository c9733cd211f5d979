"""Answers in the form of OpenAI's API."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from keras_mamba2.serving.answers import LikelyToken
from keras_mamba2.serving.answers import Piece

Body = dict[str, Any]


class CompletionBodies:
    """The answer to one request of `/v1/completions`, whole or in chunks.

    Args:
        model: string, the name of the model.
        before: list of strings, for each choice what its text begins with.
        with_likely: bool, whether log probabilities are asked for.
    """

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, before: Sequence[str], with_likely: bool = False):
        self.before = before
        self.with_likely = with_likely
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: Sequence[Piece], usage: Body) -> Body:
        """One answer of all pieces of all choices."""
        of_choices: list[list[Piece]] = [[] for _ in self.before]
        for piece in pieces:
            of_choices[piece.choice].append(piece)
        choices = []
        for number, (text, mine) in enumerate(zip(self.before, of_choices, strict=True)):
            text += "".join(piece.text for piece in mine)
            likely = [token for piece in mine for token in piece.likely]
            choices.append(self._choice(number, text, likely, mine[-1].finish_reason))
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": usage}

    def first(self) -> list[Body]:
        """The chunks before any new text."""
        return [
            self._chunk([self._choice(number, text, [], None)])
            for number, text in enumerate(self.before)
            if text
        ]

    def chunk(self, piece: Piece) -> Body:
        choice = self._delta(piece.choice, piece.text, piece.likely, piece.finish_reason)
        return self._chunk([choice])

    def last(self, usage: Body) -> Body:
        """The chunk that has the usage, and no text."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[Body]) -> Body:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choice(
        self, number: int, text: str, likely: list[LikelyToken], finish_reason: str | None
    ) -> Body:
        return {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(likely),
            "finish_reason": finish_reason,
        }

    _delta = _choice

    def _logprobs(self, likely: list[LikelyToken]) -> Body | None:
        if not self.with_likely:
            return None
        return {
            "tokens": [token.text for token in likely],
            "token_logprobs": [token.logprob for token in likely],
            "top_logprobs": [_by_text(token.top) for token in likely],
            "text_offset": [token.offset for token in likely],
        }


class ChatBodies(CompletionBodies):
    """The answer to one request of `/v1/chat/completions`, whole or in chunks."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[Body]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk(
                [{"index": number, "delta": delta, "logprobs": None, "finish_reason": None}]
            )
            for number in range(len(self.before))
        ]

    def _choice(
        self, number: int, text: str, likely: list[LikelyToken], finish_reason: str | None
    ) -> Body:
        return {
            "index": number,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(likely),
            "finish_reason": finish_reason,
        }

    def _delta(
        self, number: int, text: str, likely: list[LikelyToken], finish_reason: str | None
    ) -> Body:
        return {
            "index": number,
            "delta": {"content": text},
            "logprobs": self._logprobs(likely),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, likely: list[LikelyToken]) -> Body | None:
        if not self.with_likely:
            return None
        content = [
            {
                **_token(token.text, token.logprob),
                "top_logprobs": [_token(text, logprob) for text, logprob in token.top or ()],
            }
            for token in likely
        ]
        return {"content": content, "refusal": None}


def _by_text(top: list[tuple[str, float]] | None) -> dict[str, float] | None:
    """Of tokens with one text, such as parts of characters, the likeliest stands for all."""
    return None if top is None else dict(reversed(top))


def _token(text: str, logprob: float | None) -> Body:
    # What is part of a character has no bytes here: a decoder gives text only.
    encoded = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": encoded}
