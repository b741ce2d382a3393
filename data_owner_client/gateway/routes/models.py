"""`/v1/models`: each adapter by its name, with the PLM as its parent; `/pema/adapters`: facts about an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from data_owner_client.gateway.adapter_facts import AdapterFacts, adapter_facts
from data_owner_client.gateway.state import Gateway, gateway_of

if TYPE_CHECKING:
    from data_owner_client.gateway.served_models import ServedModel

router = APIRouter(tags=["models"])
facts_router = APIRouter(tags=["models"])


@router.get("/models", summary="The served models")
def models(request: Request) -> dict[str, Any]:
    """The served models."""
    gateway = gateway_of(request)
    return {"object": "list", "data": [_described(model, gateway) for model in gateway.models.all()]}


@router.get("/models/{name:path}", summary="One served model")
def model(request: Request, name: str) -> dict[str, Any]:
    """One served model.

    Raises:
        UnknownModel: there is none of this name.
    """
    gateway = gateway_of(request)
    return _described(gateway.models.get(name), gateway)


@facts_router.get("/pema/adapters/{name:path}", summary="Facts about an adapter")
def facts(request: Request, name: str) -> AdapterFacts:
    """Facts about an adapter.

    Raises:
        UnknownModel: there is no adapter of this name.
    """
    return adapter_facts(gateway_of(request).models.get(name))


def _described(model: ServedModel, gateway: Gateway) -> dict[str, Any]:
    card = gateway.plm.card
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "plm-owner" if model.adapter is None else "data-owner",
        "root": card.name,
        "parent": None if model.adapter is None else card.name,
        "max_model_len": card.limits.max_sequence_tokens,
    }
