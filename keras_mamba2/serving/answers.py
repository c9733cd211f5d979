"""The texts of one request of the API, as they come out of the engine."""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

from keras_mamba2.host.text_stream import TextStream
from keras_mamba2.serving.engine import Engine
from keras_mamba2.serving.prompts import Prompt
from keras_mamba2.serving.prompts import Prompts
from keras_mamba2.serving.requests import Delivery
from keras_mamba2.serving.requests import LikelyTokens
from keras_mamba2.serving.requests import Request


class LikelyToken(NamedTuple):
    """A token with its log probability, and where its text begins in the text of its choice.

    The first token of a prompt has nothing before it, and no probability.
    """

    text: str
    logprob: float | None
    offset: int
    top: list[tuple[str, float]] | None  # the likeliest tokens in its place


class Piece(NamedTuple):
    """What is new in one choice."""

    choice: int
    text: str
    likely: list[LikelyToken]
    finish_reason: str | None


@dataclasses.dataclass
class Choice:
    """A sequence of the engine that becomes a text."""

    stream: TextStream
    untold_ids: tuple[int, ...]  # of tokens without log probabilities
    num_tokens: int = 0
    num_characters: int = 0
    finish_reason: str | None = None


class Answer:
    """A request of the API: several prompts, several choices for each, and their texts.

    Args:
        engine: `Engine`.
        prompts: `Prompts`.
        asked: list of `Prompt`.
        count: int, the number of choices for each.
        seed: int; `None` for another one each time.
        num_likely: int, how many of the likeliest tokens pieces tell beside each token; `None`
            for no log probabilities at all.
        timeout: float, after how many seconds it is given up.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        asked: Sequence[Prompt],
        count: int,
        seed: int | None,
        num_likely: int | None = None,
        timeout: float | None = None,
    ):
        self.asked = asked
        self.count = count
        self.choices = [
            # Who scores a prompt counts on as many tokens as were read and picked, an end too.
            Choice(prompts.stream(p), () if p.scores else p.stop_token_ids)
            for p in asked
            for _ in range(count)
        ]
        self._engine = engine
        self._prompts = prompts
        self._num_likely = num_likely
        self._deliveries: asyncio.Queue[tuple[int, Delivery]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._deadline = None if timeout is None else self._loop.time() + timeout
        self._told: dict[int, list[LikelyToken]] = {}  # of prompts, for all choices of each
        self._requests: list[Request] = []
        self._numbers: list[list[int]] = []  # of the choices that a request's sequences become
        self._make_requests(secrets.randbits(62) if seed is None else seed)

    def submit(self) -> None:
        """Raises as `Engine.submit`."""
        self._engine.submit(self._requests)

    def cancel(self) -> None:
        for request in self._requests:
            self._engine.cancel(request)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is new, until all choices have ended. Left early, the engine is told.

        Raises:
            RuntimeError: with the engine's error, where it has one.
            TimeoutError: when the time is over.
        """
        try:
            while any(choice.finish_reason is None for choice in self.choices):
                async with asyncio.timeout_at(self._deadline):
                    which, delivery = await self._deliveries.get()
                    if delivery.error is not None:
                        raise RuntimeError(str(delivery.error)) from delivery.error
                    if (scores := delivery.prompt_likely) is None:
                        piece = self._piece(which, delivery)
                    else:  # in another thread, since a long one takes a while
                        piece = await asyncio.to_thread(self._prompt_piece, which, delivery, scores)
                if piece.text or piece.likely or piece.finish_reason:
                    yield piece
        finally:
            self.cancel()

    @property
    def usage(self) -> dict:
        """Tokens, as OpenAI's API counts them: a prompt once, however many choices it has."""
        prompt = sum(len(asked.token_ids) for asked in self.asked)
        new = sum(choice.num_tokens for choice in self.choices)
        # Of the request that has a prompt's first choice.
        of_request = zip(self._requests, self._numbers, strict=True)
        cached = sum(r.cached_tokens for r, mine in of_request for n in mine if n % self.count == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _make_requests(self, seed: int) -> None:
        """One for each text: the same text twice is two sequences, as in `lm.generate`.

        A text of more sequences than run at once has several requests.
        """
        most = self._engine.max_sequences
        numbers: dict[bytes, list[int]] = {}
        for i, asked in enumerate(self.asked):
            mine = range(i * self.count, (i + 1) * self.count)
            numbers.setdefault(asked.token_ids.tobytes(), []).extend(mine)
        for all_of_text in numbers.values():
            for first in range(0, len(all_of_text), most):
                self._add_request(all_of_text[first : first + most], first, seed)

    def _add_request(self, numbers: list[int], first: int, seed: int) -> None:
        """For the choices `numbers`, which have one text, and `first` others of it before."""
        asked = self.asked[numbers[0] // self.count]
        self._requests.append(
            Request(
                prompt=asked.token_ids,
                limit=asked.limit,
                parameters=asked.parameters,
                deliver=self._receiver(len(self._requests)),
                stop_token_ids=asked.stop_token_ids,
                seed=seed,
                count=len(numbers),
                first=first,
                with_likely=self._num_likely is not None,
                scores_prompt=asked.scores,
                keep=asked.keep,
            )
        )
        self._numbers.append(numbers)

    def _receiver(self, which: int) -> Callable[[Delivery], None]:
        """What the engine's thread calls."""

        def receive(delivery: Delivery) -> None:
            self._loop.call_soon_threadsafe(self._deliveries.put_nowait, (which, delivery))

        return receive

    def _piece(self, which: int, delivery: Delivery) -> Piece:
        number = self._numbers[which][delivery.sequence]
        choice = self.choices[number]
        if choice.finish_reason is not None:
            return Piece(number, "", [], None)
        if self._num_likely is not None or choice.stream.has_stop_strings:
            text, likely = self._one_by_one(choice, delivery)
        else:
            text, likely = choice.stream.push(delivery.token_ids), []
            choice.num_tokens += len(delivery.token_ids)
        if choice.stream.stopped:
            choice.finish_reason = "stop"
            self._engine.cancel(self._requests[which], delivery.sequence)
        elif delivery.finish_reason is not None:
            choice.finish_reason = delivery.finish_reason
            text += choice.stream.finish()
        choice.num_characters += len(text)
        return Piece(number, text, likely, choice.finish_reason)

    def _prompt_piece(self, which: int, delivery: Delivery, scores: LikelyTokens) -> Piece:
        """The prompt, of which nothing else is said before."""
        number = self._numbers[which][delivery.sequence]
        of_prompt = number // self.count
        choice, asked = self.choices[number], self.asked[of_prompt]
        if self._num_likely is not None and of_prompt not in self._told:
            self._told[of_prompt] = self._prompt_tokens(asked, scores)
        choice.num_characters = len(asked.text)
        choice.finish_reason = delivery.finish_reason
        return Piece(number, asked.text, self._told.get(of_prompt, []), delivery.finish_reason)

    def _prompt_tokens(self, asked: Prompt, scores: LikelyTokens) -> list[LikelyToken]:
        offsets = self._prompts.offsets(asked)
        first, *others = asked.token_ids.tolist()
        tokens = [LikelyToken(self._prompts.token_text(first), None, offsets[0], None)]
        for i, token_id in enumerate(others):
            tokens.append(self._likely_token(token_id, offsets[i + 1], scores, i))
        return tokens

    def _one_by_one(self, choice: Choice, delivery: Delivery) -> tuple[str, list[LikelyToken]]:
        """Takes tokens up to the one that completes a stop string, however many came at once."""
        text, likely = "", []
        for i, token_id in enumerate(delivery.token_ids.tolist()):
            choice.num_tokens += 1
            if delivery.likely is not None and token_id not in choice.untold_ids:
                offset = choice.num_characters + len(text) + choice.stream.num_held
                likely.append(self._likely_token(token_id, offset, delivery.likely, i))
            text += choice.stream.push([token_id])
            if choice.stream.stopped:
                break
        return text, likely

    def _likely_token(self, token_id: int, offset: int, found: LikelyTokens, i: int) -> LikelyToken:
        text_of = self._prompts.token_text
        top = zip(found.top_ids[i].tolist(), found.top_logprobs[i].tolist(), strict=True)
        top = [(text_of(id), logprob) for id, logprob in list(top)[: self._num_likely]]
        return LikelyToken(text_of(token_id), float(found.logprobs[i]), offset, top)
