"""The REST application: its wiring, and the middleware that records every call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.operations.call_log import (
    CLIENT_DISCONNECTED,
    OTHER,
    PROBE,
    CallRecord,
    request_id_of,
)
from plm_owner_server.operations.serving_state import shutting_down_error
from plm_owner_server.service.requests import CallContext, ClientDisconnected
from plm_owner_server.transports import openapi
from plm_owner_server.transports.calls import CALLS
from plm_owner_server.transports.rest_errors import EXCEPTION_HANDLERS, problem_response
from plm_owner_server.transports.rest_routes import HEALTHZ, READYZ, RestServer, router, server_of
from protocol.rate_limits import to_fields

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
REQUEST_ID = "X-Request-Id"
CLIENT_HEADER = "X-Pema-Client"
_CLIENT_CLOSED_REQUEST = 499  # nginx's status; HTTP has none
_NAMES = dict.fromkeys((HEALTHZ, f"{HEALTHZ}/", READYZ, f"{READYZ}/"), PROBE) | {call.path: call.name for call in CALLS}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# FastAPI's telemetry would report paths, queries and exceptions verbatim.
_NO_TELEMETRY: dict[str, Any] = {
    "telemetry": {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}
}


def create_app(
    controller: AdmissionController, *, max_body_bytes: int, max_calls: int = 128, lifespan: Lifespan | None = None
) -> FastAPI:
    """The REST application.

    Args:
        controller: admits calls. They get status 503 until the model is loaded and warm.
        max_body_bytes: size of the largest body. A larger one is refused while it is read.
        max_calls: largest number of calls in progress, including calls that wait for the model. It must exceed the
            scheduler's queue, so that the scheduler can refuse calls.
        lifespan: context of the application's life.
    """
    app = FastAPIOffline(
        redoc_url=None,
        # A redirect names http:// where a proxy speaks TLS with the client, and the key would follow it in the clear.
        redirect_slashes=False,
        swagger_ui_parameters={"validatorUrl": None},  # else the page would ask swagger.io
        title="PEMA PLM server",
        description=openapi.DESCRIPTION,
        version="1",
        lifespan=lifespan,
        exception_handlers=EXCEPTION_HANDLERS,
        **_NO_TELEMETRY,
    )
    app.state.server = RestServer(controller, max_body_bytes, CapacityLimiter(max_calls))
    app.include_router(router)
    app.middleware("http")(_record_call)
    app.add_middleware(_HeadAsGet)
    return app


class _HeadAsGet:
    """Middleware that answers HEAD as GET, without the body. FastAPI itself refuses HEAD.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or the application's life."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


async def _record_call(request: Request, call_next: Callable[[Request], Any]) -> Response:
    """Make the call's context, record the call, and answer every failure with a problem document."""
    state = server_of(request).controller.state
    request_id = request_id_of(request.headers.get(REQUEST_ID, ""))
    record = CallRecord(
        _call_name(request), "rest", _request_line(request), request_id, request.headers.get("traceparent", "")
    )
    context = CallContext(_client(request), usage=record.usage)
    request.state.record, request.state.context = record, context
    with state.at_work(), state.recorder.record(record):
        try:
            server_of(request).controller.check_host(request.headers.get("host"), request.headers.get("origin"))
            response: Response = await call_next(request)
        except (ClientDisconnect, ClientDisconnected):
            record.outcome = CLIENT_DISCONNECTED
            response = Response(status_code=_CLIENT_CLOSED_REQUEST)  # for the log: there is no reader
        except asyncio.CancelledError:  # the server ends while the body of this call arrives
            response = problem_response(request, shutting_down_error())
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a problem document
            response = problem_response(request, error)
        record.status = str(response.status_code)
    if state.is_stopping:
        # The client's next attempt opens a connection, which a load balancer gives to another server.
        response.headers["Connection"] = "close"
    response.headers[REQUEST_ID] = request_id
    response.headers.update(to_fields(context.meter.left))
    return response


def _client(request: Request) -> str:
    """The client's name for itself, or else its address."""
    return request.headers.get(CLIENT_HEADER) or (request.client.host if request.client else "")


def _call_name(request: Request) -> str:
    return _NAMES.get(request.scope["path"], OTHER)


def _request_line(request: Request) -> str:
    """Method and path. Unknown methods and paths may be any text, so they are not shown."""
    path: str = request.scope["path"]
    method = request.method if request.method in _METHODS else "?"
    return f"{method} {path}" if path in _NAMES else f"{method} no call"
