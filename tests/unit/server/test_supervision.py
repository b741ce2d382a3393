"""How a model is looked after, with one that breaks and hangs when it is told to."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, cast

import pytest

from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.operations.supervisor import EngineStuck, Supervisor
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import NotReady, PemaError
from tests import support

until = partial(support.until, within_s=60)


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

    def evict_idle(self) -> None:
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
