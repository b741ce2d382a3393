"""Errors in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from protocol.errors import PemaError


class ApiError(Exception):
    """An answer to a request that is refused."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's name
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.type = status, message, code, param, type
        self.headers = dict(headers or {})


def error_response(error: ApiError) -> JSONResponse:
    """The response in OpenAI's form."""
    return JSONResponse(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}},
        error.status,
        error.headers,
    )


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    return error_response(ApiError(error.status_code, f"{error.detail}.", headers=error.headers))


async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    return error_response(ApiError(400, first["msg"], param=".".join(map(str, first["loc"][1:]))))


async def _pema(request: Request, error: PemaError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    return error_response(ApiError(error.http_status, str(error), headers=headers))


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    ApiError: _api_error,
    HTTPException: _http_error,
    RequestValidationError: _validation,
    PemaError: _pema,
}
