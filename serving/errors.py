"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .grammar import GrammarError
from .scheduler import QueueFull, ShuttingDown, TooMany

logger = logging.getLogger("serving")
TYPE_IN_PATH = re.compile(r"str|constrained-str|list\[.*\]")  # pydantic's, behind a field that takes two types
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200. `param` names the field that is at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """What a request is told of an error of the batch, the grammar or ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, TooMany):
        return ApiError(400, str(error), code="too_many_answers")
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down", retry_after=5)
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), "response_format", "invalid_schema")
    logger.error("a request failed: %s", type(error).__name__, exc_info=error)
    return ApiError(500, f"{type(error).__name__}: {error}"[:500], code="model_error")


def of_validation(error: RequestValidationError) -> ApiError:
    """The first fault of a body, with the path of its field."""
    first = first_fault(error.errors())
    path = ".".join(str(part) for part in first["loc"] if part != "body" and not TYPE_IN_PATH.fullmatch(str(part)))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']} at character {path}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{path} is not known to this server", path, "unknown_parameter")
    return ApiError(400, f"{path or 'the body'}: {first['msg'].removeprefix('Value error, ')}", path or None)


def first_fault(faults: Sequence[dict]) -> dict:
    """Of a field that takes a text or a list there is a fault for each: the one of what was given counts."""
    others = [one for one in faults if not (one["type"] == "string_type" and isinstance(one["input"], list))]
    return (others or faults)[0]


def install(app: FastAPI) -> None:
    """Makes every error of the app one of OpenAI's shape."""

    async def of_batch(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response

    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def of_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        path = f" ({request.method} {request.url.path})" if error.status_code in (404, 405) else ""
        return ApiError(error.status_code, f"{error.detail}{path}").response

    for kind in (QueueFull, TooMany, ShuttingDown, GrammarError):
        app.add_exception_handler(kind, of_batch)

    @app.exception_handler(Exception)  # the server's own faults, which it logs
    async def of_fault(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"a fault of the server: {type(error).__name__}").response
