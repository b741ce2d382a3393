"""The tenants' clients: they send calls at random times, retry after kills, and check and count the answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.calls import Call, card, draw, head, sight_of
from benchmarks.soak.lines import Lost
from benchmarks.soak.replicas import Replica
from benchmarks.soak.tenants import FLOODED, Tenant
from benchmarks.soak.truth import Truth, WrongAnswer
from protocol.errors import BudgetExhausted, NotReady, Overloaded, PemaError, QuotaExceeded

_ATTEMPTS = 40
_PAUSE_SECONDS = 0.25
_FIRST_ROWS = 10  # candidates whose rows a tenant requests first; they check its answers


@dataclass
class Record:
    """Results of the soak so far.

    Attributes:
        answers: number of checked answers by kind of call.
        wrong: number of wrong answers by tenant, kind and fault.
        refused: number of refusals by tenant and error.
        unexpected: number of events that neither a kill nor a quota explains, by description.
        seconds: durations of calls of well-behaved tenants, by phase.
        phase: name of the present phase: `quiet`, `flood` or another one.
    """

    answers: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    phase: str = "warm-up"


class Traffic:
    """Sends calls to the replicas, and holds the tasks that do so.

    Args:
        truth: expected answers.
        replicas: servers that share a store.
    """

    def __init__(self, truth: Truth, replicas: Sequence[Replica]) -> None:
        self.truth = truth
        self.replicas = replicas
        self.record = Record()
        self._tasks: set[asyncio.Task[None]] = set()

    async def introduce(self, tenant: Tenant) -> None:
        """Request a tenant's card and, if its disclosure allows any, its first head rows."""
        line, ids = self.replicas[0].line(tenant, "http"), tenant.candidates[:_FIRST_ROWS]
        digest, rows = (await line.ask(card(tenant))).digest, None
        tenant.account.add(card(tenant).price)
        if tenant.disclosure.head_policy != "none":
            call = head(self.truth, ids, tenant.seen)
            rows = await line.ask(call)
            tenant.account.add(call.price)
        tenant.sight = sight_of(digest, tenant, rows, ids)
        if rows is not None:
            self._check(tenant, call, rows)

    async def behave(self, tenant: Tenant, rate: float) -> None:
        """Send calls at random times, `rate` a second, until cancelled."""
        while True:
            await asyncio.sleep(tenant.chance.expovariate(rate))
            scheme, first = tenant.chance.choice(["http", "grpc"]), tenant.chance.randrange(len(self.replicas))
            self.spawn(self._patiently(tenant, draw(self.truth, tenant), scheme, first))

    async def once(self, tenant: Tenant) -> None:
        """Send one call without retries."""
        scheme, replica = tenant.chance.choice(["http", "grpc"]), tenant.chance.choice(self.replicas)
        await self._attempt(tenant, draw(self.truth, tenant), scheme, replica)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task. An exception in it is recorded as unexpected."""
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._done)

    async def drain(self, seconds: float) -> None:
        """Wait for all calls in flight. Those that take longer than `seconds` are recorded as hanging."""
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=seconds)
            for task in pending:
                self.record.unexpected["hangs"] += 1
                task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.record.unexpected[f"{type(error).__name__}: {error}"] += 1

    async def _patiently(self, tenant: Tenant, call: Call, scheme: str, first: int) -> None:
        phase, started = self.record.phase, time.perf_counter()
        for attempt in range(_ATTEMPTS):
            wait_s = await self._attempt(tenant, call, scheme, self.replicas[(first + attempt) % len(self.replicas)])
            if wait_s is None:
                self.record.seconds.setdefault(phase, []).append(time.perf_counter() - started)
                return
            # The other server is tried at once, and this one again after a pause.
            await asyncio.sleep(max(wait_s, _PAUSE_SECONDS if attempt else 0.0))
        self.record.unexpected["never answered"] += 1

    async def _attempt(self, tenant: Tenant, call: Call, scheme: str, replica: Replica) -> float | None:
        """Send a call once. Return the seconds to wait before a retry, or None if it is answered."""
        was_up, kills = replica.up, replica.kills
        replica.in_flight += 1
        try:
            answer = await replica.line(tenant, scheme).ask(call)
        except (Lost, NotReady) as error:
            killed = replica.kills != kills
            if isinstance(error, Lost) and (killed or was_up):
                tenant.account.unanswered.append(call.price)
            if was_up and replica.up and not killed:
                self.record.unexpected[f"{call.kind}, {scheme}: {type(error).__name__} {error}"] += 1
            return 0.0
        except PemaError as error:
            return self._refused(tenant, call, error)
        finally:
            replica.in_flight -= 1
        tenant.account.add(call.price)
        self._check(tenant, call, answer)
        return None

    def _refused(self, tenant: Tenant, call: Call, error: PemaError) -> float | None:
        self.record.refused[f"{tenant.name}: {error.code}"] += 1
        if isinstance(error, BudgetExhausted) and tenant.quotas.head_rows is not None:
            return None  # final, so it counts as an answer
        beyond_quota = isinstance(error, QuotaExceeded) and tenant.quotas != FLOODED
        if isinstance(error, Overloaded) and error.retry_after_s is not None and not beyond_quota:
            return error.retry_after_s
        self.record.unexpected[f"{tenant.name}, {call.kind}: {error.code}"] += 1
        return None

    def _check(self, tenant: Tenant, call: Call, answer: Any) -> None:
        self.record.answers[call.kind] += 1
        try:
            call.check(answer)
        except WrongAnswer as error:
            self.record.wrong[f"{tenant.name}, {call.kind}: {error}"] += 1
