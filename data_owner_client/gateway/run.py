"""A gateway from its parts: opened in order, closed in the opposite one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch

from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.gateway.app import create_app
from data_owner_client.gateway.metrics import Metrics
from data_owner_client.gateway.owner_state import OwnerProbe
from data_owner_client.gateway.round_loop import RoundLoop
from data_owner_client.gateway.scoring import EchoScorer
from data_owner_client.gateway.served_models import ServedModels
from data_owner_client.gateway.server_process import close_in_time, listening, logged_to_stderr, serve
from data_owner_client.gateway.settings import GatewaySettings
from data_owner_client.gateway.state import Gateway
from data_owner_client.gateway.workers import Workers
from data_owner_client.plm.connect import connect
from data_owner_client.plm.connection.open import open_connection
from data_owner_client.plm.connection.settings import ConnectionSettings
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress_display import stderr_reporter
from protocol.errors import Unsupported
from protocol.types import WireDtype

# Longest time for which the connection repeats a call by itself. The loop of rounds has the patience.
_CALL_RETRY_SECONDS = 1.0
# Longest wait for the owner's answer to a probe.
_PROBE_SECONDS = 3.0
# Longest wait at the end for a call to the owner that is under way.
_CLOSING_SECONDS = 2.0


def run_gateway(
    folders: Mapping[str, Path],
    settings: GatewaySettings,
    server: str,
    connection: ConnectionSettings,
    *,
    dtype: WireDtype = "float16",
    announce: Callable[[Gateway], None] = lambda _: None,
) -> None:
    """Serve until stopped by a signal.

    Args:
        folders: the adapters' folders by name.
        settings: settings of the gateway.
        server: address of the owner's server.
        connection: settings of the connection to it; it is repeated for `retry_for` at the start alone.
        dtype: number format of representations on the wire.
        announce: called once the gateway can serve.

    Raises:
        PemaError: the gateway cannot listen, the owner's server cannot be used, or an adapter cannot.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(listening(settings.host, settings.port))
        settings = replace(settings, port=listener.getsockname()[1])
        stack.enter_context(logged_to_stderr(settings.log_level))
        plm = _connected(server, connection, dtype, settings)
        head = plm.full_head().to(torch.float32) if settings.full_head else None
        # Not waited for at the end: an answer of the owner may take minutes.
        stack.callback(close_in_time, plm.close, _CLOSING_SECONDS)
        probe = stack.enter_context(
            closing(open_connection(server, connection, retry_for=0.0, timeout=min(connection.timeout, _PROBE_SECONDS)))
        )
        models = stack.enter_context(closing(ServedModels(plm, folders)))
        rounds = RoundLoop(
            plm,
            DecodingSettings(batch_size=settings.batch_size),
            max_waiting=settings.max_waiting,
            patience_s=settings.patience,
        )
        stack.callback(close_in_time, rounds.close, _CLOSING_SECONDS)
        metrics = Metrics(lambda: [model.name for model in models.all()])
        metrics.watch(waiting=lambda: rounds.waiting, active=lambda: rounds.active)
        stack.enter_context(plm.observed_by(metrics.observe_attempt))
        owner = OwnerProbe(probe.model_card, plm.card.digest)
        workers = Workers(settings.max_waiting)
        stack.callback(workers.close)
        gateway = Gateway(plm, models, rounds, settings, metrics, owner, EchoScorer(plm), workers, head)
        app = create_app(gateway)
        announce(gateway)
        serve(app, listener)


def _connected(server: str, connection: ConnectionSettings, dtype: WireDtype, settings: GatewaySettings) -> RemotePlm:
    """The PLM, once the owner's server answers, with all that takes long at the start."""
    with connect(server, connection, dtype=dtype) as patient:
        tokenizer = patient.tokenizer
        if settings.full_head:
            try:
                patient.fetch_head(stderr_reporter())
            except Unsupported as error:
                hint = "Leave --full-head out: tokens are then drawn from the adapter's candidates."
                raise Unsupported(error.detail, hint=hint) from error
    plm = connect(server, connection, dtype=dtype, retry_for=_CALL_RETRY_SECONDS)
    if plm.card.tokenizer_digest == patient.card.tokenizer_digest:
        plm.tokenizer = tokenizer  # reading it takes seconds, which the first request would wait for
    return plm
