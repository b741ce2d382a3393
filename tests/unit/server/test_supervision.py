"""How a model is looked after, with one that breaks and hangs when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import httpx
import pytest

from data_owner_client.plm.connection.open import open_connection
from harness.tiny_models import TinyModels
from plm_owner_server.engines.interface import EncodeBatch, Encoded
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.operations.supervisor import EngineStuck, Supervisor
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import NotReady, PemaError
from protocol.messages import EncodeRequest
from tests import support

until = partial(support.until, within_s=60)
FINE = EncodeRequest(token_ids=[[5, 6]], from_position=[0])


class FakeService:
    """Does what the supervisor looks at."""

    def __init__(self) -> None:
        self.broken = threading.Event()
        self.busy_s = 0.0
        self.closed: PemaError | None = None
        self.tidied = threading.Event()
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def forget_unused(self) -> None:
        self.tidied.set()

    def close(self, error: PemaError) -> None:
        self.closed = error


class Watched:
    """A supervisor in its thread; `loads` says how each attempt to load ends."""

    def __init__(self, *loads: FakeService | Exception, timeout_s: float = 60) -> None:
        self.loads = list(loads)
        self.state = ServingState()
        self.ends: list[PemaError] = []
        self.supervisor = Supervisor(
            self.load, self.state, engine_timeout_s=timeout_s, give_up=self.ends.append, pauses_s=(0.0, 0.0)
        )
        self.thread = threading.Thread(target=self.supervisor.run, daemon=True)
        self.thread.start()

    def load(self) -> PlmService:
        outcome = self.loads.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return cast(PlmService, outcome)

    def wait_for(self, service: FakeService) -> None:
        until(lambda: self.state.service is cast(Any, service))

    def end(self) -> PemaError:
        self.thread.join(30)
        (error,) = self.ends
        assert self.state.service is None
        assert not self.state.is_ready
        return error


def test_what_never_worked_is_not_tried_again() -> None:
    first = PemaError("no such model")
    assert Watched(first).end() is first
    assert "KeyError" in str(Watched(KeyError("x")).end())


def test_a_broken_engine_is_replaced_and_at_last_given_up() -> None:
    services = [FakeService(), FakeService(), FakeService()]
    watched = Watched(*services)
    for service in services:
        watched.wait_for(service)
        service.broken.set()
    assert "again and again" in str(watched.end())
    assert not watched.loads


def test_a_failed_attempt_to_load_again_is_not_the_last() -> None:
    services = [FakeService(), FakeService()]
    watched = Watched(services[0], PemaError("no memory"), services[1])
    watched.wait_for(services[0])
    services[0].broken.set()
    watched.wait_for(services[1])
    services[1].broken.set()
    assert "again and again" in str(watched.end())


def test_an_engine_that_worked_for_long_gets_all_attempts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plm_owner_server.operations.supervisor._WELL_S", 0.0)
    services = [FakeService() for _ in range(6)]
    watched = Watched(*services, PemaError("one"), PemaError("two"))
    for service in services:
        watched.wait_for(service)
        service.broken.set()
    assert "two" in str(watched.end())


def test_an_engine_that_dies_while_nobody_calls_is_replaced() -> None:
    first, second = FakeService(), FakeService()
    watched = Watched(first, second, timeout_s=0.1)
    watched.wait_for(first)
    first.alive = False
    watched.wait_for(second)
    assert isinstance(first.closed, NotReady)
    assert not watched.ends


def test_an_engine_that_ends_with_the_process_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plm_owner_server.operations.supervisor._LOOK_EVERY_S", 0.02)
    service = FakeService()
    watched = Watched(service, FakeService())
    watched.wait_for(service)
    watched.supervisor.stop()
    service.alive = False
    watched.thread.join(30)
    assert not watched.thread.is_alive()
    assert not watched.ends
    assert len(watched.loads) == 1
    assert watched.state.service is cast(Any, service)


def test_a_hanging_engine_is_the_end() -> None:
    service = FakeService()
    watched = Watched(service, FakeService(), timeout_s=0.2)
    watched.wait_for(service)
    assert service.tidied.wait(30)
    service.busy_s = 0.3
    assert isinstance(watched.end(), EngineStuck)
    assert isinstance(service.closed, NotReady)
    assert service.closed.retry_after_s
    assert len(watched.loads) == 1


class _Ailing:
    """An engine that breaks at a word, for ever."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.info, self.head, self.counts = engine.info, engine.head, engine.counts
        self.drafting, self.forget_unused, self.is_alive = engine.drafting, engine.forget_unused, engine.is_alive
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
def test_an_engine_that_breaks_is_a_503_and_a_new_engine(tiny_models: TinyModels, transport: str) -> None:
    load_again, gave_up = threading.Event(), list[PemaError]()
    loads = 0

    def load() -> PlmService:
        nonlocal loads
        loads += 1
        assert loads == 1 or load_again.wait(60)
        return support.make_service(tiny_models["llama"], wrap=_Ailing)

    state = ServingState()
    supervisor = Supervisor(load, state, engine_timeout_s=60, give_up=gave_up.append)
    threading.Thread(target=supervisor.run, daemon=True).start()
    with served(state, transport) as url:
        until(lambda: state.is_ready)
        connection = open_connection(url, give_up_after_s=0)
        expected = connection.encode(FINE)
        for request in (EncodeRequest(token_ids=[[66]], from_position=[0]), FINE):
            with pytest.raises(NotReady) as caught:
                connection.encode(request)
            assert caught.value.retry_after_s
            assert "GEHEIM" not in str(caught.value)
        until(lambda: not state.is_ready)
        if transport == "rest":
            assert httpx.get(f"{url}/readyz").status_code == 503
            assert httpx.get(f"{url}/healthz").status_code == 200
        load_again.set()
        until(lambda: state.is_ready)
        assert connection.encode(FINE).cr_N_D.equal(expected.cr_N_D)
        connection.close()
    assert not gave_up
