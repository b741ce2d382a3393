"""Adapters for tests that train none."""

from __future__ import annotations

from typing import Any

from data_owner_client.adapter.card import AdapterCard
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.plm.identity import ModelIdentity
from protocol.head import LMHead


def adapter_card(model: ModelIdentity, head: LMHead, **fields: Any) -> AdapterCard:
    """The card of an adapter with these head rows; what no field says has some value."""
    defaults = {
        "context_mode": "private",
        "form": "residual",
        "candidates": len(head.weight_V_D),
        "length_ratio": 1.0,
        "mean_length": 4.0,
        "interpolation": Interpolation(),
        "interpolation_why": "a test",
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "settings": {},
        "validation": {},
        "memory_digest": "e" * 64,
    }
    return AdapterCard(model=model, **(defaults | fields))
