"""Runs the application: on a socket, until it is told to end."""

import asyncio
import gc
import logging

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

# How long a client may take to send the head of a request.
HEAD_SECONDS = 10.0
# And how long it may read nothing of an answer, once as much waits for it as may.
WRITE_SECONDS = 60.0


class PatientForAWhile(H11Protocol):
    """Closes connections whose next request does not begin, or whose head stays unfinished.

    And those whose client does not read. uvicorn itself limits the pause between two requests only.
    """

    _head: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()
        self._forget_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_writing()

    def _expect_head(self) -> None:
        # After an answer that did not wait for the body, the rest of that body is waited for too.
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _forget_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def run(app, host: str, port: int, drain_seconds: float, most_connections: int) -> None:
    """Serves until SIGTERM or SIGINT; then finishes what runs, for at most `drain_seconds`."""
    # The model lives as long as the process. To search it for garbage takes two thirds of a second,
    # in which all streams stop.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PatientForAWhile,
        ws="none",
        log_level=logging.INFO,
        access_log=False,
        limit_concurrency=most_connections,
        timeout_graceful_shutdown=int(drain_seconds),
        server_header=False,
    )
    uvicorn.Server(config).run()
