"""The supervisor over a service that breaks, dies and hangs when it is told to."""

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
        self.scheduler = self.engine = self
        self.broken = threading.Event()
        self.busy_s = 0.0
        self.closed: PemaError | None = None
        self.tidied = threading.Event()
        self.alive: bool | None = True  # None: looking at it fails

    def is_alive(self) -> bool:
        if self.alive is None:
            raise RuntimeError
        return self.alive

    def evict_idle(self) -> None:
        self.tidied.set()

    def close(self, error: PemaError) -> None:
        self.closed = error


class Watched:
    """A supervisor in its thread; `outcome` says how loading ends."""

    def __init__(self, outcome: FakeService | Exception, timeout_s: float = 60) -> None:
        self.outcome = outcome
        self.loads = 0
        self.state = ServingState()
        self.ends: list[PemaError] = []
        self.supervisor = Supervisor(self.load, self.state, engine_timeout_s=timeout_s, give_up=self.ends.append)
        self.thread = threading.Thread(target=self.supervisor.run, daemon=True)
        self.thread.start()

    def load(self) -> PlmService:
        self.loads += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return cast(PlmService, self.outcome)

    def wait_for(self, service: FakeService) -> None:
        until(lambda: self.state.service is cast(Any, service))

    def end(self) -> PemaError:
        self.thread.join(30)
        (error,) = self.ends
        assert self.state.service is None
        assert not self.state.is_ready
        assert self.loads == 1
        return error


def test_a_model_that_cannot_be_loaded_is_the_end() -> None:
    first = PemaError("no such model")
    assert Watched(first).end() is first
    assert "KeyError" in str(Watched(KeyError("x")).end())


def test_a_broken_engine_is_the_end() -> None:
    service = FakeService()
    watched = Watched(service)
    watched.wait_for(service)
    service.broken.set()
    assert "failed its check" in str(watched.end())


def test_an_engine_that_dies_while_nobody_calls_is_the_end() -> None:
    service = FakeService()
    watched = Watched(service, timeout_s=0.1)
    watched.wait_for(service)
    service.alive = False
    assert "The engine has died" in str(watched.end())
    assert isinstance(service.closed, NotReady)
    assert service.closed.retry_after_s
    with pytest.raises(NotReady, match="the server restarts"):
        watched.state.ready()


def test_an_engine_that_cannot_be_watched_is_the_end() -> None:
    service = FakeService()
    watched = Watched(service, timeout_s=0.1)
    watched.wait_for(service)
    service.alive = None
    assert "cannot be watched" in str(watched.end())


def test_an_engine_that_ends_with_the_process_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plm_owner_server.operations.supervisor._POLL_SECONDS", 0.02)
    service = FakeService()
    watched = Watched(service)
    watched.wait_for(service)
    watched.supervisor.stop()
    service.alive = False
    watched.thread.join(30)
    assert not watched.thread.is_alive()
    assert not watched.ends
    assert watched.state.service is cast(Any, service)


def test_a_hanging_engine_is_the_end() -> None:
    service = FakeService()
    watched = Watched(service, timeout_s=0.2)
    watched.wait_for(service)
    assert service.tidied.wait(30)
    service.busy_s = 0.3
    assert isinstance(watched.end(), EngineStuck)
    assert isinstance(service.closed, NotReady)
    assert service.closed.retry_after_s
