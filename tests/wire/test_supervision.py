"""A server whose engine breaks at a word: its answers until it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx
import pytest

from data_owner_client.plm.connection.open import open_connection
from harness.tiny_models import TinyModels
from plm_owner_server.engines.interface import EncodeBatch, Encoded
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.operations.supervisor import Supervisor
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import NotReady, PemaError
from protocol.messages import EncodeRequest
from tests import support

pytestmark = pytest.mark.unguarded("servers of its own, without tenants")

until = partial(support.until, within_s=60)
FINE = EncodeRequest(token_ids=[[5, 6]], from_position=[0])


class _Ailing:
    """An engine that breaks at a word, for ever."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.info, self.head, self.stats = engine.info, engine.head, engine.stats
        self.drafting, self.evict_idle, self.is_alive = engine.drafting, engine.evict_idle, engine.is_alive
        self.broken = False

    def warm_up(self) -> None:
        if self.broken:
            raise RuntimeError("GEHEIM")
        self.engine.warm_up()

    def encode(self, batch: EncodeBatch) -> Encoded:
        self.broken |= batch.token_ids == [[66]]
        if self.broken:
            raise RuntimeError("GEHEIM")
        return self.engine.encode(batch)


@contextmanager
def served(state: ServingState, transport: str) -> Iterator[str]:
    serve = support.serve_state if transport == "rest" else support.serve_state_over_grpc
    with serve(state, max_body_bytes=2**20) as url:
        yield url


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_an_engine_that_breaks_is_a_503(tiny_models: TinyModels, transport: str) -> None:
    def load() -> PlmService:
        return support.make_service(tiny_models["llama"], wrap=_Ailing)

    state, gave_up = ServingState(), list[PemaError]()
    supervisor = Supervisor(load, state, engine_timeout_s=60, give_up=gave_up.append)
    threading.Thread(target=supervisor.run, daemon=True).start()
    with served(state, transport) as url:
        until(lambda: state.is_ready)
        connection = open_connection(url, retry_for=0)
        assert len(connection.encode(FINE).cr_N_D) == 2
        for request in (EncodeRequest(token_ids=[[66]], from_position=[0]), FINE):
            with pytest.raises(NotReady) as caught:
                connection.encode(request)
            assert caught.value.retry_after_s
            assert "GEHEIM" not in str(caught.value)
        until(lambda: not state.is_ready)
        if transport == "rest":
            assert httpx.get(f"{url}/readyz").status_code == 503
            assert httpx.get(f"{url}/healthz").status_code == 200
        connection.close()
    until(lambda: len(gave_up) == 1)
    assert "failed its check" in str(gave_up[0])
