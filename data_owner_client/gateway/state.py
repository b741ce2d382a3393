"""State of a gateway, which all handlers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

if TYPE_CHECKING:
    from data_owner_client.gateway.metrics import Metrics
    from data_owner_client.gateway.owner_state import OwnerProbe
    from data_owner_client.gateway.round_loop import RoundLoop
    from data_owner_client.gateway.scoring import EchoScorer
    from data_owner_client.gateway.served_models import ServedModels
    from data_owner_client.gateway.settings import GatewaySettings
    from data_owner_client.gateway.workers import Workers
    from data_owner_client.plm.remote_plm import RemotePlm
    from protocol.head import LMHead


@dataclass(frozen=True)
class Gateway:
    """State of an application (`app.state.gateway`).

    Attributes:
        plm: the PLM, over a connection whose calls fail rather than repeat for long.
        models: the served models.
        rounds: the loop that all answers grow in.
        settings: settings of the gateway, with the port that it listens on.
        metrics: metrics of the gateway.
        owner: tells whether the owner's server answers.
        scorer: scores echoed prompts.
        workers: threads for calls that are not made in the loop.
        head: all rows of the LM head in float32, for draws from the whole vocabulary; None for draws from candidates.
    """

    plm: RemotePlm
    models: ServedModels
    rounds: RoundLoop
    settings: GatewaySettings
    metrics: Metrics
    owner: OwnerProbe
    scorer: EchoScorer
    workers: Workers
    head: LMHead | None = None


def gateway_of(request: Request) -> Gateway:
    """The state of a request's application."""
    gateway: Gateway = request.app.state.gateway
    return gateway
