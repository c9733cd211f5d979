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


class BodyLimits:
    """Middleware that ends requests whose body is too large, or does not arrive in time."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = self._limited(receive, Headers(scope=scope).get("content-length", "0"))
        await self._app(scope, receive, send)

    def _limited(self, receive: Receive, announced: str) -> Receive:
        deadline = asyncio.get_running_loop().time() + self._limits.body_seconds
        received, is_whole = 0, False

        async def receive_within_limits() -> Message:
            nonlocal received, is_whole
            if is_whole:  # what comes now is that the client has gone, whenever it does
                return await receive()
            self._check_size(int(announced) if announced.isdecimal() else 0)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                message = "The body of the request did not arrive in time."
                raise HTTPException(408, message, {"Connection": "close"}) from None
            received += len(message.get("body", b""))
            self._check_size(received)
            is_whole = not message.get("more_body", False)
            return message

        return receive_within_limits

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise HTTPException(
                413, f"A request may have a body of at most {self._limits.body_bytes} bytes."
            )


def check_hosts(hosts: Sequence[str]) -> None:
    """Raises for a pattern other than a name, `*` and `*.name`.

    Raises:
        ValueError: that names it.
    """
    for host in hosts:
        if not host or ("*" in host.removeprefix("*.") and host != "*"):
            raise ValueError(
                "A name that clients call the server by must be one such as 'example.org', "
                f"'*.example.org' for all below it, or '*' for any. Received: {host!r}"
            )


def check_keys(keys: Sequence[str]) -> None:
    """Raises for a key that everybody knows: an empty one, which is sent without any.

    Raises:
        ValueError: also for one string, whose characters would each be a key.
    """
    if isinstance(keys, str) or not all(isinstance(key, str) and key.strip() for key in keys):
        received = "a string" if isinstance(keys, str) else "a blank one"  # never a key
        raise ValueError(
            "API keys must be a list of strings that are not blank. For a server without keys, "
            f"pass none, and set none in the environment. Received: {received}"
        )


class ApiKeys:
    """Middleware that serves the API to those who send one of `keys`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Wherever it is: mounted in another application, the path has what stands before too.
        if scope["type"] == "http" and "/v1/" in scope["path"]:
            sent = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
            if not self._is_known(sent.encode("latin-1")):  # the bytes as they came
                message = "Send an API key of this server: `Authorization: Bearer KEY`."
                headers = {"WWW-Authenticate": "Bearer"}
                response = error_response(401, message, code="invalid_api_key", headers=headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, sent: bytes) -> bool:
        """In a time that does not tell how much of a key was right, nor which key."""
        return any([hmac.compare_digest(sent, key) for key in self._keys])
