"""Middleware that gives each request an id, a line in the log, and safe headers; no text reaches either."""

from __future__ import annotations

import logging
import time
import traceback
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_owner_client.gateway.metrics import OTHER, Metrics
from data_owner_client.gateway.openai.errors import ApiError, error_response

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Of every answer: none is a document of another kind than it says, or a part of another page.
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Asked every few seconds.
_PROBES = frozenset({"/health", "/metrics"})
_CLIENT_CLOSED_REQUEST = 499  # nginx's status; HTTP has none


class RequestLog:
    """Middleware around everything else. Whatever fails inside is answered with an error of OpenAI's form.

    Args:
        app: the application.
        metrics: counts the requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or the application's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, request_id = time.perf_counter(), 0, f"req_{uuid.uuid4().hex}"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an error in OpenAI's form
            # Its message may hold text.
            log.error("%s in request %s\n%s", type(error).__qualname__, request_id, _frames(error))
            if not status:
                failed = ApiError(500, "The gateway has failed. Its log says how.", code="server_error")
                await error_response(failed)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status or _CLIENT_CLOSED_REQUEST, time.perf_counter() - started, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        # The path itself may be any text.
        route = getattr(scope.get("route"), "path", OTHER)
        method = scope["method"] if scope["method"] in _METHODS else "?"
        self._metrics.count_request(route, status, seconds)
        level = logging.DEBUG if route in _PROBES else logging.INFO
        log.log(level, "%s %s %d in %.3f s, %s", method, route, status, seconds, request_id)


def _frames(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)).rstrip()
