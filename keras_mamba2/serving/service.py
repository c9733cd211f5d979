"""Answers requests of OpenAI's API, whole or as a stream, while their clients are there."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from keras_mamba2.conversion.describe import state_bytes
from keras_mamba2.serving.answers import Answer
from keras_mamba2.serving.answers import Piece
from keras_mamba2.serving.bodies import ChatBodies
from keras_mamba2.serving.bodies import CompletionBodies
from keras_mamba2.serving.engine import Engine
from keras_mamba2.serving.errors import ApiError
from keras_mamba2.serving.errors import error_body
from keras_mamba2.serving.limits import Limits
from keras_mamba2.serving.metrics import Metrics
from keras_mamba2.serving.openai_types import ChatRequest
from keras_mamba2.serving.openai_types import CompletionRequest
from keras_mamba2.serving.openai_types import Generation
from keras_mamba2.serving.prompts import Prompt
from keras_mamba2.serving.prompts import Prompts

# A proxy hands on pieces as they come.
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Service:
    """One model under one name.

    Args:
        engine: `Engine`.
        name: string, what clients call the model.
        limits: `Limits`.
        metrics: `Metrics`.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, metrics: Metrics):
        self.name = name
        self.prompts = Prompts(engine.lm, engine.max_tokens)
        self._engine = engine
        self._limits = limits
        self._metrics = metrics

    @property
    def facts(self) -> dict[str, Any]:
        """What the page shows of the model."""
        backbone = self._engine.lm.backbone
        fixed, per_token = state_bytes(backbone)
        return {
            "model": self.name,
            "chats": self.prompts.chats,
            "max_tokens": self._engine.max_tokens,
            "state_bytes": fixed,
            "state_bytes_per_token": per_token,
            "cache_bytes_per_token": cache_bytes(backbone),
        }

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        self._check_model(body)
        asked = await self._read(self.prompts.of_completion, body)
        # A prompt that is scored comes with its scores, as the first piece of the answer.
        told = body.echo and not body.scores_prompt
        before = [p.text if told else "" for p in asked for _ in range(body.count)]
        bodies = CompletionBodies(self.name, before, body.num_likely is not None)
        return await self._answer(body, http, asked, bodies)

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        self._check_model(body)
        if not self.prompts.chats:
            raise ApiError(
                400,
                f"{self.name} has no chat template: it continues texts, and was not trained to "
                "answer. Use /v1/completions.",
                "model",
                "no_chat_template",
            )
        asked = await self._read(self.prompts.of_chat, body)
        bodies = ChatBodies(self.name, [""] * body.count, body.num_likely is not None)
        return await self._answer(body, http, [asked], bodies)

    def _check_model(self, body: Generation) -> None:
        if body.model != self.name:
            message = (
                f"The model {body.model!r} does not exist here. This server has {self.name!r}."
            )
            raise ApiError(404, message, "model", "model_not_found")

    async def _read(self, read, body) -> Any:
        """Tokens of a text; in another thread, since a long one takes a while."""
        try:
            return await run_in_threadpool(read, body)
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    async def _answer(
        self, body: Generation, http: Request, asked: Sequence[Prompt], bodies: CompletionBodies
    ) -> Response:
        answer = Answer(
            self._engine,
            self.prompts,
            asked,
            body.count,
            body.seed,
            num_likely=body.num_likely,
            timeout=self._limits.seconds,
        )
        try:
            answer.submit()
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        if body.stream:
            events = self._events(answer, bodies, body.includes_usage)
            return EventSourceResponse(events, headers=STREAM_HEADERS)
        pieces = await _unless_gone(http, self._all_pieces(answer))
        # Of many tokens with their probabilities it takes seconds.
        return await run_in_threadpool(lambda: JSONResponse(bodies.whole(pieces, answer.usage)))

    async def _all_pieces(self, answer: Answer) -> list[Piece]:
        return [piece async for piece in self._timed(answer)]

    async def _events(
        self, answer: Answer, bodies: CompletionBodies, with_usage: bool
    ) -> AsyncIterator[bytes]:
        try:
            for chunk in bodies.first():
                yield _event(chunk)
            async for piece in self._timed(answer):
                yield _event(bodies.chunk(piece))
            if with_usage:
                yield _event(bodies.last(answer.usage))
            yield format_sse_event(data_str="[DONE]")
        except TimeoutError:
            yield _event(error_body(504, "The request took too long.", code="timeout"))
        except RuntimeError as error:
            yield _event(error_body(500, str(error)))

    async def _timed(self, answer: Answer) -> AsyncIterator[Piece]:
        """The pieces, with the times between them counted."""
        begun = time.perf_counter()
        last: dict[int, float] = {}
        async for piece in answer.pieces():
            now = time.perf_counter()
            if piece.choice in last:
                self._metrics.gap.observe(now - last[piece.choice])
            elif not last:
                self._metrics.first_token.observe(now - begun)
            last[piece.choice] = now
            yield piece
        self._metrics.duration.observe(time.perf_counter() - begun)


def cache_bytes(backbone) -> int:
    """What a transformer of this width keeps of a token: keys and values of every layer, 16 bits.

    A layer of attention with its MLP has about the parameters of two Mamba-2 layers, so it has
    half as many layers as a pure model.
    """
    layers = -(-len(backbone.blocks) // 2)
    return layers * 2 * backbone.hidden_dim * 2


def _event(body: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(body))


async def _unless_gone(http: Request, answering) -> Any:
    """The result, unless the client goes before: then the work is given up.

    Raises:
        ApiError: for nobody, since nobody is there.
    """
    work = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ApiError(499, "The client has gone.")
    finally:
        for task in (work, gone):
            task.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
