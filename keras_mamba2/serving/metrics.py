"""What `/metrics` tells, in the format of Prometheus."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp
from starlette.types import Message
from starlette.types import Receive
from starlette.types import Scope
from starlette.types import Send

from keras_mamba2.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)


class Metrics:
    """Counters and times of one server.

    Args:
        engine: `Engine`, which counts what it does.
    """

    def __init__(self, engine: Engine):
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(OfEngine(engine))
        self.requests = prometheus_client.Counter(
            "keras_mamba2_requests",
            "Requests that were answered, by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.first_token = prometheus_client.Histogram(
            "keras_mamba2_first_token_seconds",
            "From a request to its first text.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.gap = prometheus_client.Histogram(
            "keras_mamba2_gap_seconds",
            "Between two pieces of one text.",
            buckets=GAP_SECONDS,
            registry=self._registry,
        )
        self.duration = prometheus_client.Histogram(
            "keras_mamba2_request_seconds",
            "From a request to the end of its answer.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        return prometheus_client.generate_latest(self._registry)


class OfEngine(Collector):
    """Reads the engine's own numbers whenever it is asked."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine = self._engine
        counts, cache = engine.counts, engine.prefix_cache
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
            ("cached_tokens", "Of these, tokens that were known.", counts.cached_tokens),
            ("new_tokens", "Tokens that were generated.", counts.new_tokens),
            ("finished_sequences", "Sequences that came to their end.", counts.finished),
            (
                "cancelled_sequences",
                "Ended by a stop string or the client.",
                counts.cancelled,
            ),
            ("failed_sequences", "Sequences that ended with an error.", counts.failed),
            ("prefix_hits", "Prompts of which a beginning was known.", cache.hits),
            ("prefix_misses", "Prompts of which none was.", cache.misses),
            ("prefix_evictions", "States that made room for others.", cache.evictions),
        ):
            yield CounterMetricFamily(f"keras_mamba2_{name}", what, value=value)
        for name, what, value in (
            ("waiting_requests", "Requests in the queue.", engine.num_waiting),
            ("reading_requests", "Prompts that are being read.", engine.num_reading),
            ("running_sequences", "Sequences that get tokens.", engine.num_running),
            ("rows", "Rows of the loop, used or not.", engine.num_rows),
            ("prefix_states", "States that are kept.", len(cache)),
            ("prefix_bytes", "Bytes of these states.", cache.nbytes),
        ):
            yield GaugeMetricFamily(f"keras_mamba2_{name}", what, value=value)


class CountRequests:
    """Middleware that counts answers. Unknown paths count as one, so that clients make no names."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def counting(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._count(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception:
            # Its answer is made outside of this, by the outermost layer of the application.
            if not has_begun:
                self._count(scope, 500)
            raise

    def _count(self, scope: Scope, status: int) -> None:
        route = scope.get("route")
        path = "other" if route is None else route.path
        self._metrics.requests.labels(path, status).inc()
