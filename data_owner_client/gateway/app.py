"""The gateway's application: its routes, and the middleware around them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from data_owner_client.gateway.openai.errors import EXCEPTION_HANDLERS
from data_owner_client.gateway.request_log import REQUEST_ID, RequestLog
from data_owner_client.gateway.routes import answers, models, operation, tokens
from data_owner_client.gateway.routes.page import page_files, page_router
from data_owner_client.gateway.security import OriginGuard, RequestGuard
from data_owner_client.gateway.settings import GatewaySettings
from data_owner_client.gateway.state import Gateway

# Headers of answers that pages of other hosts may read.
_EXPOSED = (REQUEST_ID, "retry-after", "x-pema-note", "x-should-retry")
# FastAPI's telemetry would report paths, queries and exceptions verbatim.
_NO_TELEMETRY: dict[str, Any] = {
    "telemetry": {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}
}
# Some applications are given the gateway's address without the version behind it.
_PREFIXES = ("/v1", "")


def create_app(gateway: Gateway) -> FastAPI:
    """The application of a gateway."""
    app = FastAPI(
        title="PEMA gateway",
        version="1",
        docs_url=None,  # its pages would load scripts from a host of others
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(gateway),
        exception_handlers=EXCEPTION_HANDLERS,
        **_NO_TELEMETRY,
    )
    app.state.gateway = gateway
    for prefix in _PREFIXES:
        for router in (answers.router, models.router):
            app.include_router(router, prefix=prefix, include_in_schema=bool(prefix))
    app.include_router(models.facts_router)
    app.include_router(tokens.router)
    app.include_router(operation.router)
    app.include_router(page_router())
    return app


def _middleware(gateway: Gateway) -> list[Middleware]:
    """The middleware, from the outside to the inside."""
    settings = gateway.settings
    return [
        Middleware(RequestLog, metrics=gateway.metrics),
        Middleware(OriginGuard, settings=settings),
        *_cors(settings),
        Middleware(RequestGuard, settings=settings, open_paths=(operation.HEALTH, *page_files())),
    ]


def _cors(settings: GatewaySettings) -> list[Middleware]:
    if not settings.allow_origin:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origin,
            allow_methods=("GET", "POST"),
            # Those that OpenAI's own libraries send from pages begin alike, and differ by version.
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )
    ]
