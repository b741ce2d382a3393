"""Goodput and refusals when clients send ten times as much as the model can compute.

Capacity is the throughput of a closed loop of a few clients. The open loop after it sends at ten times that rate,
whatever the responses are. It never retries, and drops calls that still wait at its end. Both count responses between
the first and the last within their time. They take turns on one server, whose tenants have quotas that never bind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from data_owner_client.plm.connection.open import open_connection
from harness import report
from harness.prepared_load import ANSWERED, REFUSED, Grpc, Rest, Wire
from harness.processes import server
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.settings import DEFAULT_MODEL
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import TenantStore
from protocol.cores import usable_cores
from protocol.integrity import token_crc32s
from protocol.messages import EncodeRequest

_WORK = report.FOLDER / "overload"
_TENANTS, _CLIENTS, _TIMES = 4, 8, 10
_LENGTHS = (300, 500)  # tokens of a request
_ROWS = 16  # last rows of each request that are requested
_TEXTS = 64
_SETTLING = 0.2  # share of a phase at its start that is not counted
_MAX_RATE = 400  # requests a second above which the generator itself would be measured


@dataclass
class Phase:
    """Results of the requests of one phase.

    Attributes:
        outcomes: number of requests by outcome, the settling time included.
        answers: time and tokens of each answered request after the settling time.
        waited_s: seconds from request to answer of each of these requests.
        offered: tokens that were sent.
        seconds: length of the phase.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[float, int]] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    offered: int = 0
    seconds: float = 0.0

    def tokens_per_s(self) -> float:
        """Tokens per second of the counted answers, from the first to the last."""
        if len(self.answers) < 2:
            raise SystemExit("Too few answers to measure: give more --seconds.")
        (first, _), *others = self.answers
        return sum(tokens for _, tokens in others) / (others[-1][0] - first)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of shorter phases")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model that is served")
    parser.add_argument("--seconds", type=float, help="length of a phase; a fifth of it is not counted")
    arguments = parser.parse_args()
    rounds, seconds = (1, 12.0) if arguments.quick else (3, 45.0)
    seconds, threads = arguments.seconds or seconds, usable_cores()
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    store = TenantStore(f"sqlite:///{_WORK / 'owner.db'}")
    quotas = Quotas(10**12, 10**12, 10**6, 10**6, 10**6)
    keys = [
        str(store.add(f"tenant-{i}", disclosure=Disclosure("candidate", rotated=True), quotas=quotas))
        for i in range(_TENANTS)
    ]
    flags = ("--model", arguments.model, "--threads", str(threads), "--prefix-cache-mib", "0")
    with server(_WORK / "server.log", *flags) as ports:
        requests = _requests(ports[0], keys[0])
        figures = {
            name: asyncio.run(_measured(wire, port, keys, requests, rounds, seconds))
            for name, wire, port in (("rest", Rest, ports[0]), ("grpc", Grpc, ports[1]))
        }
    report.write(
        "overload",
        {
            "goodput_ratio": min(figure["goodput_ratio"] for figure in figures.values()),
            "refusals_without_retry_after": sum(f["refusals_without_retry_after"] for f in figures.values()),
            **figures,
            "rounds": rounds,
            "seconds_a_phase": seconds,
            "tenants": _TENANTS,
            "threads": threads,
        },
    )


def _requests(port: int, key: str) -> list[EncodeRequest]:
    connection = open_connection(f"http://127.0.0.1:{port}", api_key=key)
    card = connection.model_card()
    connection.close()
    chance, requests = random.Random(0), []
    for _ in range(_TEXTS):
        length = min(chance.randint(*_LENGTHS), card.limits.max_sequence_tokens)
        ids = [[chance.randrange(3, min(card.vocab_size, 10_000)) for _ in range(length)]]
        requests.append(EncodeRequest(token_ids=ids, from_position=[length - _ROWS], echo=token_crc32s(ids)))
    return requests


async def _measured(
    wire_type: type[Rest | Grpc],
    port: int,
    keys: Sequence[str],
    requests: Sequence[EncodeRequest],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Measure capacity, overload, capacity and so on; compare each overload with the capacity before and after it."""
    tokens = [len(request.token_ids[0]) for request in requests]
    async with AsyncExitStack() as stack:
        wire = wire_type(stack, port, keys, requests)
        capacities, overloads = [await _closed(wire, tokens, seconds)], list[Phase]()
        for number in range(rounds):
            rate = _TIMES * capacities[-1].tokens_per_s() / mean(tokens)
            overloads.append(await _open(wire, tokens, seconds, rate, random.Random(number)))
            capacities.append(await _closed(wire, tokens, seconds))
    before_and_after = [
        mean(phase.tokens_per_s() for phase in capacities[number : number + 2]) for number in range(rounds)
    ]
    outcomes = sum((phase.outcomes for phase in (*capacities, *overloads)), Counter[str]())
    goodput = [phase.tokens_per_s() / capacity for phase, capacity in zip(overloads, before_and_after, strict=True)]
    offered = [
        phase.offered / phase.seconds / capacity for phase, capacity in zip(overloads, before_and_after, strict=True)
    ]
    return {
        "goodput_ratio": median(goodput),
        "refusals_without_retry_after": outcomes.total() - outcomes[ANSWERED] - outcomes[REFUSED],
        "capacity_tokens_per_s": median(phase.tokens_per_s() for phase in capacities),
        "goodput_tokens_per_s": median(phase.tokens_per_s() for phase in overloads),
        "offered_over_capacity": median(offered),
        "answer_waits_s": median(second for phase in overloads for second in phase.waited_s),
        "outcomes": dict(outcomes),
    }


async def _closed(wire: Wire, tokens: Sequence[int], seconds: float) -> Phase:
    """Run a few clients that each send the next request when the last one is answered."""
    phase, started = Phase(seconds=seconds), time.perf_counter()

    async def client(number: int) -> None:
        for text in range(number, 10**9, _CLIENTS):
            await _send(wire, number % _TENANTS, text % len(tokens), tokens, phase, started)

    await _for(seconds, [asyncio.create_task(client(number)) for number in range(_CLIENTS)])
    return phase


async def _open(wire: Wire, tokens: Sequence[int], seconds: float, rate: float, chance: random.Random) -> Phase:
    """Send requests at random times, `rate` a second, whatever their outcomes are."""
    if rate > _MAX_RATE:
        raise SystemExit(f"{rate:.0f} requests a second would measure the generator: take a larger model.")
    phase, started = Phase(seconds=seconds), time.perf_counter()
    sending: set[asyncio.Task[None]] = set()
    due = started
    while (due := due + chance.expovariate(rate)) < started + seconds:
        await asyncio.sleep(due - time.perf_counter())
        sent = _send(wire, chance.randrange(_TENANTS), chance.randrange(len(tokens)), tokens, phase, started)
        sending.add(task := asyncio.create_task(sent))
        task.add_done_callback(sending.discard)
    await _for(0, list(sending))
    return phase


async def _send(wire: Wire, tenant: int, text: int, tokens: Sequence[int], phase: Phase, started: float) -> None:
    sent = time.perf_counter()
    phase.offered += tokens[text]
    outcome = await wire.send(tenant, text)
    phase.outcomes[outcome] += 1
    ended = time.perf_counter()
    if outcome == ANSWERED and ended - started >= _SETTLING * phase.seconds:
        phase.answers.append((ended, tokens[text]))
        phase.waited_s.append(ended - sent)


async def _for(seconds: float, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Run tasks for `seconds`, then cancel them. Errors in a task are raised here."""
    done, pending = await asyncio.wait(tasks, timeout=seconds) if tasks else (set(), set())
    for task in pending:
        task.cancel()
    for task in (*done, *pending):
        with suppress(asyncio.CancelledError):
            await task


if __name__ == "__main__":
    main()
