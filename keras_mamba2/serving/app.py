"""The server's routes: OpenAI's API, the server's own state, and a page to try it."""

import contextlib
import pathlib
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request
from fastapi.responses import HTMLResponse
from fastapi.responses import JSONResponse
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from keras_mamba2.serving.engine import Engine
from keras_mamba2.serving.errors import ApiError
from keras_mamba2.serving.errors import add_error_handlers
from keras_mamba2.serving.limits import ApiKeys
from keras_mamba2.serving.limits import BodyLimits
from keras_mamba2.serving.limits import Limits
from keras_mamba2.serving.limits import check_hosts
from keras_mamba2.serving.limits import check_keys
from keras_mamba2.serving.metrics import CountRequests
from keras_mamba2.serving.metrics import Metrics
from keras_mamba2.serving.openai_types import ChatRequest
from keras_mamba2.serving.openai_types import CompletionRequest
from keras_mamba2.serving.service import Service

PAGE = pathlib.Path(__file__).with_name("page.html")
NO_EMBEDDINGS = (
    "This server has no embeddings. Its model was trained to continue text; what its hidden states "
    "are worth as embeddings is not known."
)


# The page needs nothing from elsewhere, and may load nothing from there.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'none'"
}


def create_app(
    engine: Engine,
    name: str,
    limits: Limits | None = None,
    api_keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """A FastAPI application that serves one model.

    Args:
        engine: a `keras_mamba2.serving.engine.Engine` after `start`. It is closed when the
            application ends, after the last request.
        name: string, what clients call the model.
        limits: `keras_mamba2.serving.limits.Limits`.
        api_keys: list of strings, one of which clients must send. Without any, everyone is served.
        allowed_hosts: strings, what the server may be called. With names of this machine alone, no
            web page can get at it by a name of its own that leads here.

    Raises:
        ValueError: for an API key that is blank.
    """
    check_keys(api_keys)
    check_hosts(allowed_hosts)
    limits = limits or Limits()
    metrics = Metrics(engine)
    service = Service(engine, name, limits, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(
        title="keras_mamba2",
        lifespan=lifespan,
        docs_url=None,  # pages that fetch their parts from other hosts
        redoc_url=None,
    )
    add_error_handlers(app)
    app.add_middleware(BodyLimits, limits=limits)
    if api_keys:
        app.add_middleware(ApiKeys, keys=api_keys)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    app.add_middleware(CountRequests, metrics=metrics)
    _add_openai_routes(app, service)
    _add_own_routes(app, engine, service, metrics)
    return app


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    model = {
        "id": service.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "keras_mamba2",
    }

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await service.complete(body, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return await service.chat(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    # Names of models have slashes.
    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(
                404, f"The model {name!r} does not exist here.", "model", "model_not_found"
            )
        return model

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise ApiError(404, NO_EMBEDDINGS, code="not_supported")


def _add_own_routes(app: FastAPI, engine: Engine, service: Service, metrics: Metrics) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/page/model", include_in_schema=False)
    async def page_model() -> dict[str, Any]:
        return service.facts

    @app.get("/health")
    async def health() -> Response:
        """Whether the process can do its work; if not, it should be started anew."""
        if engine.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        if not engine.is_ready:
            return JSONResponse({"status": "not ready"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
