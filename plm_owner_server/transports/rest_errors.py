"""Errors over HTTP: a problem document for every exception that a call can raise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from plm_owner_server.operations.call_log import CallRecord
from plm_owner_server.service.requests import ClientDisconnected
from protocol.errors import PROBLEM_JSON, InvalidRequest, PemaError, Unauthenticated, to_problem
from protocol.integrity import error_path


def problem_response(request: Request, caught: Exception, status: int | None = None) -> Response:
    """The response to a failed call. The failure is noted in the call's record.

    Args:
        request: the failed request.
        caught: reason of the failure.
        status: HTTP status; by default that of the error.
    """
    record: CallRecord = request.state.record
    error = record.fail(caught)
    problem = to_problem(error)
    problem["status"] = status or error.http_status
    headers = {"Retry-After": str(math.ceil(error.retry_after_s))} if error.retry_after_s is not None else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(problem), problem["status"], headers, PROBLEM_JSON)


async def _client_disconnected(request: Request, error: ClientDisconnected) -> Response:
    raise error  # the middleware records it: there is no reader for an answer


async def _pema_error(request: Request, error: PemaError) -> Response:
    return problem_response(request, error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    # For unknown paths and methods. Starlette's text is safe: it quotes nothing of the request.
    wrapped = InvalidRequest(f"{error.detail}.", hint="The calls are listed in the OpenAPI page (/docs).")
    return problem_response(request, wrapped, status=error.status_code)


async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    wrapped = InvalidRequest(f"{error_path(first['loc'])}: {first['msg']}.", hint="See the OpenAPI page (/docs).")
    return problem_response(request, wrapped)


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    ClientDisconnected: _client_disconnected,
    PemaError: _pema_error,
    HTTPException: _http_error,
    RequestValidationError: _validation_error,
}
"""Handlers of an application, by type of exception."""
