"""`/health` and `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from data_owner_client.gateway.state import gateway_of

HEALTH, METRICS = "/health", "/metrics"
router = APIRouter(tags=["operation"])


@router.api_route(HEALTH, methods=["GET", "HEAD"], summary="Is the gateway alive, and its owner?")
def health(request: Request) -> dict[str, Any]:
    """The gateway's state with status 200 while it lives; with the key, also that of the owner and of each model."""
    if not request.state.is_authorised:
        return {"status": "ok"}
    gateway = gateway_of(request)
    return {
        "status": "ok",
        "owner": gateway.owner.state(),
        "models": {model.name: model.version for model in gateway.models.all()},
        "problems": gateway.models.problems,
        "waiting": gateway.rounds.waiting,
        "active": gateway.rounds.active,
    }


@router.get(METRICS, summary="Metrics for Prometheus", response_class=Response)
def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    return Response(gateway_of(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
