"""The scheduler over an engine that only notes what it is asked for."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch, Encoded, EngineInfo, EngineStats
from plm_owner_server.service import scheduler as module
from plm_owner_server.service.requests import CallContext, ClientDisconnected, EngineBatch
from plm_owner_server.service.scheduler import Scheduler
from protocol.errors import NotReady, Overloaded
from protocol.head import LMHead
from protocol.integrity import token_crc32
from tests.support import until


class NotingEngine:
    """A row of a sequence is its first token; holds its first call until `go`."""

    def __init__(self) -> None:
        self.info = EngineInfo(1, 10, None, "float32", "last_hidden_state", ())
        self.head = LMHead(torch.zeros(10, 1))
        self.calls: list[tuple[str, list[int]]] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self.running = 0
        self.stats = EngineStats()
        self.broken = False

    def warm_up(self) -> None:
        if self.broken:
            raise RuntimeError("still no luck")

    def is_alive(self) -> bool:
        return True

    def evict_idle(self) -> None: ...

    def reset(self) -> None: ...

    def note(self, what: str, token_ids: Sequence[Sequence[int]]) -> None:
        self.running += 1
        assert self.running == 1, "one call at a time"
        self.calls.append((what, [ids[0] for ids in token_ids]))
        self.entered.set()
        assert self.go.wait(60)
        self.running -= 1
        if any(ids[0] == 666 for ids in token_ids):
            raise RuntimeError("no luck")

    def encode(self, batch: EncodeBatch) -> Encoded:
        self.note("encode", batch.token_ids)
        rows = [len(ids) - start for ids, start in zip(batch.token_ids, batch.from_position, strict=True)]
        cr = torch.tensor([[float(ids[0])] for ids, n in zip(batch.token_ids, rows, strict=True) for _ in range(n)])
        logsumexp_N = cr[:, 0] if batch.with_logsumexp else None
        return Encoded(rows, [token_crc32(ids) for ids in batch.token_ids], cr, None, logsumexp_N)

    def drafting(self, batch_tokens: int) -> NotingDrafting:
        return NotingDrafting(self)


class NotingDrafting:
    def __init__(self, engine: NotingEngine) -> None:
        self.engine = engine
        self.steps: dict[DraftBatch, int] = {}

    def join(self, batches: Sequence[DraftBatch]) -> int:
        self.engine.note("join", [ids for batch in batches for ids in batch.token_ids])
        self.steps |= dict.fromkeys(batches, 0)
        return sum(batch.tokens for batch in batches)

    def step(self) -> list[tuple[DraftBatch, Decoded]]:
        self.engine.note("step", [ids for batch in self.steps for ids in batch.token_ids])
        self.steps = {batch: steps + 1 for batch, steps in self.steps.items()}
        done = [batch for batch, steps in self.steps.items() if steps >= max(batch.look_ahead)]
        return [(batch, self.result(batch)) for batch in done if self.steps.pop(batch) is not None]

    def leave(self, batch: DraftBatch) -> None:
        del self.steps[batch]

    def result(self, batch: DraftBatch) -> Decoded:
        rows = [k + 1 for k in batch.look_ahead]
        top1_N = torch.tensor([ids[0] for ids, n in zip(batch.token_ids, rows, strict=True) for _ in range(n)])
        values_N = top1_N.float()
        echoes = [token_crc32(ids) for ids in batch.token_ids]
        return Decoded(rows, echoes, values_N[:, None], None, values_N, top1_N, values_N)


class Desk:
    """A scheduler and the requests made to it, in the order in which they came."""

    def __init__(self, **settings: Any) -> None:
        self.engine = NotingEngine()
        limits = {"batch_tokens": 100, "padding_tokens": 20, "drafting_tokens": 10**7}
        limits |= {"max_waiting_tokens": 10**6, "max_waiting_requests": 50}
        self.scheduler = Scheduler(self.engine, **(limits | settings))
        self.pool = ThreadPoolExecutor(64)
        self.asked = 0

    def ask(self, client: str | CallContext, *works: EngineBatch) -> Future[list[Encoded]]:
        """Make a request, and wait until the scheduler has it."""
        caller = client if isinstance(client, CallContext) else CallContext(client)
        future = self.pool.submit(self.scheduler.run, caller, works)
        self.asked += 1
        until(lambda: future.done() or len(self.scheduler._requests) >= self.asked, within_s=30)
        return future

    def hold(self) -> Future[list[Encoded]]:
        """Occupy the engine, so that what comes now waits."""
        future = self.ask("holder", encode(0))
        assert self.engine.entered.wait(30)
        return future


@pytest.fixture
def desk() -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(**settings: Any) -> Desk:
        desks.append(Desk(**settings))
        return desks[-1]

    yield make
    for made in desks:
        made.engine.go.set()
        made.pool.shutdown()


def encode(*firsts: int, tokens: int = 10, logsumexp: bool = False, tenant: str = "") -> EncodeBatch:
    return EncodeBatch([[first] * tokens for first in firsts], [0] * len(firsts), logsumexp, tenant)


def draft(*firsts: int, k: int, tokens: int = 10) -> DraftBatch:
    return DraftBatch([[first] * tokens for first in firsts], [tokens - 1] * len(firsts), [k] * len(firsts))


def test_clients_take_turns_by_tokens(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    bulk = d.ask("bulk", *[encode(i, tokens=90) for i in range(1, 6)])
    small = d.ask("small", *[encode(10 + i, tokens=45, logsumexp=True) for i in range(4)])
    d.engine.go.set()
    assert [float(result.cr_N_D[0]) for result in bulk.result(30)] == [1, 2, 3, 4, 5]
    assert [float(result.cr_N_D[0]) for result in small.result(30)] == [10, 11, 12, 13]
    order = [firsts[0] for _, firsts in d.engine.calls[1:]]
    # Two of 45 tokens for each of 90; which of the two begins is a matter of who came first.
    assert order == [1, 10, 11, 2, 12, 13, 3, 4, 5]


def test_a_translation_is_not_blocked_by_a_bulk_builder(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    bulk = d.ask("bulk", *[encode(i, tokens=100) for i in range(1, 11)])
    translation = d.ask("translator", draft(50, k=5))
    d.engine.go.set()
    bulk.result(30)
    translation.result(30)
    last_step = max(i for i, (what, _) in enumerate(d.engine.calls) if what == "step")
    assert last_step < 9
    assert [what for what, _ in d.engine.calls].count("step") == 5


def test_small_batches_of_several_clients_go_together(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    futures = [d.ask(f"client {i}", encode(i, 100 + i, tokens=8 + i % 2)) for i in range(1, 5)]
    others = [d.ask("with", encode(50, logsumexp=True)), d.ask("long", encode(60, tokens=99))]
    drafts = [d.ask(f"drafter {i}", draft(i, k=k)) for i, k in ((70, 2), (71, 3), (72, 9))]
    d.engine.go.set()
    for i, future in enumerate(futures, 1):
        (result,) = future.result(30)
        assert result.rows == [8 + i % 2] * 2
        assert result.cr_N_D[:, 0].tolist() == [float(i)] * result.rows[0] + [100.0 + i] * result.rows[1]
        assert result.echo == [token_crc32([i] * result.rows[0]), token_crc32([100 + i] * result.rows[1])]
    for future, (i, k) in zip(drafts, ((70, 2), (71, 3), (72, 9)), strict=True):
        (result,) = future.result(30)
        assert isinstance(result, Decoded)
        assert result.top1_N.tolist() == [i] * (k + 1)
    assert others[0].result(30)[0].logsumexp_N is not None
    others[1].result(30)
    batches = [sorted(firsts) for what, firsts in d.engine.calls[1:] if what != "step"]
    assert sorted(batches) == [[1, 2, 3, 4, 101, 102, 103, 104], [50], [60], [70, 71, 72]]


def test_who_comes_later_joins_at_the_next_step_and_nobody_waits_for_the_last(desk: Callable[..., Desk]) -> None:
    d = desk()
    long = d.ask("long", draft(1, k=200))
    assert d.engine.entered.wait(30)
    short = d.ask("short", draft(2, k=2))
    another = d.ask("long", draft(3, k=1))
    d.engine.go.set()
    for future in (long, short, another):
        future.result(30)
    assert [firsts for what, firsts in d.engine.calls if what == "join"] == [[1], [2, 3]]
    steps = [firsts for what, firsts in d.engine.calls if what == "step"]
    assert steps[1:4] == [[1, 2, 3], [1, 2], [1]]


def test_what_is_drafted_is_bounded(desk: Callable[..., Desk]) -> None:
    d = desk(drafting_tokens=45)
    d.hold()
    futures = [d.ask(f"client {i}", draft(i, k=5)) for i in range(1, 9)]
    too_long = d.ask("long", draft(9, k=100))
    d.engine.go.set()
    for future in futures:
        future.result(30)
    too_long.result(30)
    assert max(len(firsts) for what, firsts in d.engine.calls if what == "step") == 3
    assert all(firsts == [9] for _, firsts in d.engine.calls if 9 in firsts)


def test_tenants_are_not_encoded_together(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    futures = [d.ask(f"client {i}", encode(i, tenant="ab"[i % 2])) for i in range(1, 5)]
    d.engine.go.set()
    for future in futures:
        future.result(30)
    assert sorted(sorted(firsts) for _, firsts in d.engine.calls[1:]) == [[1, 3], [2, 4]]


def test_a_client_alone_is_always_computed_in_the_same_way(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    futures = [d.ask("one", encode(i)) for i in range(1, 4)]
    d.engine.go.set()
    for future in futures:
        future.result(30)
    assert [firsts for _, firsts in d.engine.calls] == [[0], [1], [2], [3]]


def test_departed_clients_are_skipped(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    gone, here = CallContext("gone"), CallContext("here")
    lost = d.ask(gone, encode(1), encode(2))
    kept = d.ask(here, encode(3))
    gone.disconnected.set()
    d.engine.go.set()
    with pytest.raises(ClientDisconnected):
        lost.result(30)
    kept.result(30)
    assert [firsts for _, firsts in d.engine.calls] == [[0], [3]]


def test_drafting_of_a_departed_client_ends(desk: Callable[..., Desk]) -> None:
    d = desk()
    gone = CallContext("gone")
    lost = d.ask(gone, draft(1, k=10**6))
    assert d.engine.entered.wait(30)
    gone.disconnected.set()
    d.engine.go.set()
    with pytest.raises(ClientDisconnected):
        lost.result(30)
    assert len(d.engine.calls) < 10


def test_what_is_too_much_is_turned_away_with_a_time_to_come_back(desk: Callable[..., Desk]) -> None:
    d = desk(max_waiting_tokens=100, max_waiting_requests=4)
    first = d.ask("big", encode(1, tokens=500))  # alone, however large
    assert d.engine.entered.wait(30)
    with pytest.raises(Overloaded) as caught:
        d.ask("other", encode(2)).result(30)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    d.engine.go.set()
    first.result(30)
    d.engine.go.clear()
    d.engine.entered.clear()
    d.asked = 0
    waiting = [d.hold(), d.ask("one", encode(3, tokens=45))]  # 10 and 45 tokens
    with pytest.raises(Overloaded):  # its half is full
        d.ask("one", encode(4)).result(30)
    d.asked -= 1
    waiting += [d.ask("two", encode(5)), d.ask("three", encode(6))]
    with pytest.raises(Overloaded):  # no place for a fifth request
        d.ask("four", encode(7)).result(30)
    d.engine.go.set()
    for future in waiting:
        future.result(30)
    assert (d.scheduler._requests, d.scheduler._tokens, d.scheduler._virtual_time) == (set(), {}, {})


def test_one_client_cannot_have_all_places(desk: Callable[..., Desk]) -> None:
    d = desk(max_waiting_requests=6)
    waiting = [d.hold(), *(d.ask("one", encode(n)) for n in (2, 3, 4))]
    with pytest.raises(Overloaded):
        d.ask("one", encode(5)).result(30)
    d.asked -= 1
    waiting.append(d.ask("two", encode(6)))
    d.engine.go.set()
    for future in waiting:
        future.result(30)


def test_a_failure_reaches_those_it_concerns(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    bad = [d.ask("a", encode(666), encode(1)), d.ask("b", encode(2)), d.ask("c", draft(666, k=2))]
    good = d.ask("d", encode(3, tokens=90), encode(4, tokens=90))
    d.engine.go.set()
    errors = []
    for future in bad:
        with pytest.raises(RuntimeError, match="no luck") as caught:
            future.result(30)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 3
    assert len(good.result(30)) == 2
    assert [1] not in [firsts for _, firsts in d.engine.calls]


def test_a_broken_engine_ends_all_requests_at_once(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.hold()
    d.engine.broken = True
    asked = [d.ask("a", encode(666)), d.ask("b", encode(2)), d.ask("c", draft(3, k=2)), d.ask("a", encode(4))]
    d.engine.go.set()
    errors = []
    for future in asked:
        with pytest.raises(NotReady) as caught:
            future.result(30)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == len(errors)
    assert all(error.retry_after_s for error in errors)
    assert d.scheduler.broken.is_set()
    with pytest.raises(NotReady):
        d.scheduler.run(CallContext("late"), [encode(5)])
    until(lambda: not d.scheduler._requests, within_s=30)  # they leave behind their answers
    assert 5 not in [first for _, firsts in d.engine.calls for first in firsts]


def test_an_engine_that_only_failed_once_goes_on(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.engine.go.set()
    with pytest.raises(RuntimeError, match="no luck"):
        d.scheduler.run(CallContext("a"), [encode(666)])
    assert not d.scheduler.broken.is_set()
    assert d.scheduler.run(CallContext("a"), [encode(1)])


@pytest.mark.parametrize("work", [encode(1), draft(1, k=1000)], ids=["encode", "draft"])
def test_a_closed_scheduler_waits_for_no_engine(desk: Callable[..., Desk], work: EngineBatch) -> None:
    d = desk()
    running = d.ask("a", work)
    assert d.engine.entered.wait(30)
    waiting = d.ask("b", encode(2))
    assert d.scheduler.busy_s > 0
    d.scheduler.close(NotReady("The server is stopping."))
    for future in (running, waiting):
        with pytest.raises(NotReady, match="stopping"):
            future.result(30)
    with pytest.raises(NotReady, match="stopping"):
        d.scheduler.run(CallContext("late"), [encode(3)])
    thread = d.scheduler._thread
    assert thread is not None
    d.engine.go.set()
    thread.join(30)
    assert not thread.is_alive()
    assert d.scheduler.busy_s == 0
    assert {first for _, firsts in d.engine.calls for first in firsts} == {1}


def test_the_thread_ends_when_idle_and_comes_back(desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER_SECONDS", 0.01)
    d = desk()
    d.engine.go.set()
    for i in range(5):
        assert d.pool.submit(d.scheduler.run, CallContext("x"), [encode(i)]).result(30)
        until(lambda: d.scheduler._thread is None, within_s=30)


def test_many_clients_at_once_all_get_their_own(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.engine.go.set()

    def client(number: int) -> None:
        chooser = random.Random(number)
        for turn in range(20):
            firsts = [chooser.randrange(1, 600) for _ in range(chooser.randint(1, 4))]
            works: list[EngineBatch] = [encode(first, first + 1000, tokens=chooser.randint(1, 9)) for first in firsts]
            works += [draft(first, k=chooser.randint(0, 3)) for first in firsts]
            results = d.scheduler.run(CallContext(str(number % 7)), works)
            for work, result in zip(works, results, strict=True):
                assert result.echo == [token_crc32(ids) for ids in work.token_ids], turn

    for future in [d.pool.submit(client, i) for i in range(24)]:
        future.result(60)
    assert not d.scheduler._drafted
