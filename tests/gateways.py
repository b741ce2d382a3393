"""A gateway in the process of the tests, on a port of its own, in front of an owner's server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.gateway.app import create_app
from data_owner_client.gateway.metrics import Metrics
from data_owner_client.gateway.owner_state import OwnerProbe
from data_owner_client.gateway.round_loop import RoundLoop
from data_owner_client.gateway.scoring import EchoScorer
from data_owner_client.gateway.served_models import ServedModels
from data_owner_client.gateway.server_process import listening
from data_owner_client.gateway.settings import GatewaySettings
from data_owner_client.gateway.state import Gateway
from data_owner_client.gateway.workers import Workers
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import PemaError
from protocol.messages import DecodeResponse
from tests import guard

_CALL_RETRY_SECONDS = 1.0


class WatchedPlm:
    """A PLM that counts its calls of `decode`.

    Args:
        plm: the PLM.
    """

    def __init__(self, plm: RemotePlm) -> None:
        self._plm = plm
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plm, name)

    def decode(self, prompts: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> DecodeResponse:
        self.calls += 1
        self.before_call(prompts)
        return self._plm.decode(prompts, *arguments, **options)

    def before_call(self, prompts: Sequence[Sequence[int]]) -> None:
        """Called before each call. An error that it raises is that of the call."""


class FaultyPlm(WatchedPlm):
    """A PLM whose calls fail where a function says so.

    Args:
        plm: the PLM.
        fault: the error of a call by its number, which counts from 1; None for no error.
    """

    def __init__(self, plm: RemotePlm, fault: Callable[[int], PemaError | None]) -> None:
        super().__init__(plm)
        self._fault = fault

    def before_call(self, prompts: Sequence[Sequence[int]]) -> None:
        if (fault := self._fault(self.calls)) is not None:
            raise fault


@contextmanager
def gateway(
    server: str, folders: Mapping[str, Path], *, wrap: Callable[[RemotePlm], Any] | None = None, **settings: Any
) -> Iterator[str]:
    """Serve adapters from their folders, with float32 on the wire, and give the gateway's address.

    Args:
        server: address of the owner's server.
        folders: the adapters' folders by name.
        wrap: puts something around the PLM, for tests of failures.
        settings: of `GatewaySettings`.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(listening("127.0.0.1", 0))
        chosen = GatewaySettings(port=listener.getsockname()[1], **settings)
        connection = stack.enter_context(closing(guard.connection(server, retry_for=_CALL_RETRY_SECONDS)))
        plm: Any = RemotePlm(connection, dtype="float32", cache=None)
        plm = wrap(plm) if wrap else plm
        models = stack.enter_context(closing(ServedModels(plm, folders)))
        decoding = DecodingSettings(batch_size=chosen.batch_size)
        rounds = RoundLoop(plm, decoding, max_waiting=chosen.max_waiting, patience_s=chosen.patience)
        stack.callback(rounds.close)
        metrics = Metrics(lambda: [model.name for model in models.all()])
        metrics.watch(waiting=lambda: rounds.waiting, active=lambda: rounds.active)
        owner = OwnerProbe(connection.model_card, plm.card.digest)
        workers = Workers(chosen.max_waiting)
        stack.callback(workers.close)
        head = plm.full_head().to(torch.float32) if chosen.full_head else None
        app = create_app(Gateway(plm, models, rounds, chosen, metrics, owner, EchoScorer(plm), workers, head))
        running = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, name="gateway")
        thread.start()
        try:
            while not running.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{chosen.port}"
        finally:
            running.should_exit = True
            thread.join()
