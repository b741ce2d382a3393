"""Errors in OpenAI's form, for everything that a request to the gateway can raise.

openai-python repeats calls with status 408, 409, 429 and from 500 on by itself, after the time in `Retry-After`. The
header `x-should-retry: false` keeps it from repeating what cannot succeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from data_owner_client.data.reading.problems import TextTooLong
from protocol import errors
from protocol.errors import PemaError
from protocol.integrity import error_path

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""Code that applications know a text by that is too long for the model."""
_RETRY_SECONDS = 1.0
_NO_RETRY = {"x-should-retry": "false"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


class ApiError(Exception):
    """An error of the gateway's API.

    Args:
        status: HTTP status.
        message: what happened and what to do, in one line.
        code: word by which applications tell errors apart; None for none.
        param: path of the request's field that is at fault; None if it is none.
        type: OpenAI's kind of the error; by default that of its status.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,  # noqa: A002 - the wire's name
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type or (INVALID_REQUEST if status < 500 else SERVER_ERROR)
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class _Form:
    """The form of one kind of error.

    Attributes:
        status: HTTP status; None for the error's own.
        code: word of the error; None for none.
        type: OpenAI's kind; None for that of the status.
        repeats: whether a later call may succeed; None if the status alone says so.
    """

    status: int | None
    code: str | None = None
    type: str | None = None
    repeats: bool | None = None


# The first that an error is an instance of. The owner's key is the gateway's, so no application is asked for another.
_FORMS: tuple[tuple[type[PemaError], _Form], ...] = (
    (errors.IdentityMismatch, _Form(503, "model_mismatch", repeats=False)),
    (errors.BudgetExhausted, _Form(403, "insufficient_quota", "insufficient_quota", repeats=False)),
    (errors.Unauthenticated, _Form(502, "upstream_auth", repeats=False)),
    (errors.Forbidden, _Form(502, "upstream_auth", repeats=False)),
    (errors.Misdirected, _Form(502, "upstream_misdirected", repeats=False)),
    (errors.Untrusted, _Form(502, "upstream_untrusted", repeats=False)),
    (errors.Overloaded, _Form(429, "rate_limit_exceeded", "rate_limit_error", repeats=True)),
    (errors.NotReady, _Form(503, "upstream_unavailable", repeats=True)),
    (errors.RequestTimeout, _Form(503, "upstream_unavailable", repeats=True)),
    (errors.ConnectionFailed, _Form(503, "upstream_unavailable", repeats=True)),
    (errors.OverLimit, _Form(400, CONTEXT_LENGTH_EXCEEDED)),
    (TextTooLong, _Form(400, CONTEXT_LENGTH_EXCEEDED)),
    (errors.Unsupported, _Form(400, "unsupported")),
    (errors.InvalidData, _Form(400)),
    (errors.InvalidRequest, _Form(None)),
)
_OTHER = _Form(502, "upstream_error")


def api_error(error: PemaError, param: str | None = None) -> ApiError:
    """The error of the API for an error of this project.

    Args:
        error: what was raised, by the client or by the owner's server.
        param: path of the field at fault, where the caller knows it.
    """
    form = next((form for kind, form in _FORMS if isinstance(error, kind)), _OTHER)
    status = form.status
    code = form.code
    if status is None:
        status = error.http_status if error.http_status == 404 else 400
        code = error.code if status == 404 else None
        param = param or ("model" if code == "model_not_found" else None)
    headers = dict[str, str]()
    if form.repeats:
        wait_s = _RETRY_SECONDS if error.retry_after_s is None else error.retry_after_s
        headers["Retry-After"] = str(math.ceil(wait_s))
    elif form.repeats is False:
        headers = dict(_NO_RETRY)
    return ApiError(status, str(error), code=code, param=param, type=form.type, headers=headers)


def error_response(error: ApiError) -> Response:
    """The response that has the error."""
    return JSONResponse(error.body, error.status, error.headers)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def _pema_error(request: Request, error: PemaError) -> Response:
    return error_response(api_error(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    # Starlette's text is safe: it quotes nothing of the request.
    message = f"{error.detail}. The gateway answers /v1/chat/completions, /v1/completions and /v1/models."
    if error.status_code not in _CODES:
        message = f"{error.detail}."
    return error_response(
        ApiError(error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers)
    )


async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    return error_response(validation_error(error.errors()[0]))


def validation_error(first: Mapping[str, Any]) -> ApiError:
    """The error of the API for the first error of pydantic, which quotes nothing of the request."""
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.")
    path = [part for part in first["loc"] if part != "body"]
    param = error_path(path) if path else None
    message = str(first["msg"]).rstrip(".")
    return ApiError(400, f"{param}: {message}." if param else f"The body is not valid: {message}.", param=param)


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    ApiError: _api_error,
    PemaError: _pema_error,
    HTTPException: _http_error,
    RequestValidationError: _validation_error,
}
"""Handlers of an application, by type of exception."""
