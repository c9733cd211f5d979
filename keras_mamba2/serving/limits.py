"""What a client may do: the sizes and times of a request, and who is served at all."""

import asyncio
import dataclasses
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp
from starlette.types import Message
from starlette.types import Receive
from starlette.types import Scope
from starlette.types import Send

from keras_mamba2.serving.errors import error_response


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of each request.

    Args:
        body_bytes: int, the size of its body.
        body_seconds: float, how long its body may take to arrive.
        seconds: float, how long its answer may take, the time in the queue included.
    """

    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0
    seconds: float = 600.0


class BodyDeadline:
    """Middleware that ends requests whose body does not arrive in time."""

    def __init__(self, app: ASGIApp, seconds: float):
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._seconds
        is_whole = False

        async def receive_in_time() -> Message:
            nonlocal is_whole
            if is_whole:  # what comes now is that the client has gone, whenever it does
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, "The body of the request did not arrive in time."
                ) from None
            is_whole = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


class ApiKeys:
    """Middleware that serves the API to those who send one of `keys`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            sent = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
            if not self._is_known(sent.encode()):
                message = "Send an API key of this server: `Authorization: Bearer KEY`."
                headers = {"WWW-Authenticate": "Bearer"}
                response = error_response(401, message, code="invalid_api_key", headers=headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, sent: bytes) -> bool:
        """In a time that does not tell how much of a key was right, nor which key."""
        return any([hmac.compare_digest(sent, key) for key in self._keys])
