"""Errors in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from keras_mamba2.serving.engine import Closed
from keras_mamba2.serving.engine import QueueFull

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_SECONDS = 1


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: int, of HTTP.
        message: string, for people.
        param: string, the parameter that is wrong.
        code: string, for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    # Half of a surrogate pair, as a client may send it, could not be written.
    message = message.encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Makes all errors of an app answers in this form."""

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, str(error), error.param, error.code)

    @app.exception_handler(QueueFull)
    async def of_queue(request: Request, error: QueueFull) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return error_response(429, str(error), None, "rate_limit_exceeded", headers)

    @app.exception_handler(Closed)
    async def of_closed(request: Request, error: Closed) -> JSONResponse:
        return error_response(503, str(error), None, "unavailable")

    @app.exception_handler(TimeoutError)
    async def of_time(request: Request, error: TimeoutError) -> JSONResponse:
        return error_response(504, "The request took too long.", None, "timeout")

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(400, *_what_is_wrong(error))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def of_server(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"The server failed: {error}")


def _what_is_wrong(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, and with which parameter."""
    first = max(error.errors(), key=_telling)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first['ctx']['error']}", None
    # Without what pydantic calls the alternatives of a parameter.
    where = [part for part in map(str, first["loc"][1:]) if part.isidentifier() or part.isdigit()]
    if not where:
        return message, None
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {'.'.join(where)}"
    else:
        message = f"`{'.'.join(where)}`: {message}"
    return message, where[0]


def _telling(error: Mapping[str, Any]) -> tuple[bool, int]:
    """Of the errors of all alternatives of a parameter, that of the one which was meant."""
    return not error["type"].endswith("_type"), len(error["loc"])
