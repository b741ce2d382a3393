"""Adapters for tests that train none."""

from __future__ import annotations

from typing import Any

import torch

from data_owner_client.adapter.card import AdapterCard
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.head import LMHead

_RANK = 4


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


def random_adapter(plm: RemotePlm, *, most_candidates: int | None = None, **fields: Any) -> TrainedAdapter:
    """An adapter with random weights and every fourth token as a candidate; the fields are those of its card."""
    ids_C = torch.arange(3, plm.card.vocab_size, 4)[:most_candidates]
    head, network = plm.head_rows(ids_C), Adapter(plm.card.hidden_size, _RANK, "residual")
    generator = torch.Generator().manual_seed(3)
    for weight in network.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    card = adapter_card(ModelIdentity.from_card(plm.card), head, rank=_RANK, **fields)
    return TrainedAdapter(card, network.eval(), ids_C, head)
