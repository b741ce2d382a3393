"""Mixed traffic of twenty tenants against two servers that share a store, on a seeded schedule.

Seventeen tenants behave well, in a first, quiet phase alone. Then one tenant floods in bouts, one breaks off calls or
never reads, one sends garbage, and one server is killed from time to time. Every answer is compared with transformers.
At the end the output of `pema-server tenants usage` is compared with the answers that the clients received.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.soak import adversaries
from benchmarks.soak.calls import max_call_tokens
from benchmarks.soak.replicas import Replica
from benchmarks.soak.tenants import FLOODED, Tenant, add_tenants
from benchmarks.soak.traffic import Traffic
from benchmarks.soak.truth import Truth
from harness import report
from harness.tiny_models import save_model
from plm_owner_server.tenants.store import TenantStore

_WORK = report.FOLDER / "soak"
_RATE = 0.6  # calls a second of each well-behaved tenant
_CUT_RATE = _GARBAGE_RATE = 2.0
_QUIET = 0.1  # share of the time
_WARM_UP_SECONDS = 5.0
_MINUTES_A_KILL = 3.5
_BOUT_SECONDS, _PAUSE_SECONDS = (15.0, 40.0), (5.0, 15.0)  # of the flood
_FLAGS = ("--dtype", "float32", "--device", "cpu", "--threads", "1", "--prefix-cache-mib", "16")


def main() -> None:
    """Run the soak, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    minutes = 2.0 if arguments.quick else arguments.minutes
    shutil.rmtree(_WORK, ignore_errors=True)
    model = save_model("gemma3", (_WORK / "model").absolute())
    report.write("soak", asyncio.run(_soak(model, minutes, arguments.seed)))


async def _soak(model: Path, minutes: float, seed: int) -> dict[str, Any]:
    truth = Truth(model)
    url = f"sqlite:///{_WORK.absolute() / 'owner.db'}"
    store = TenantStore(url)
    good, bad = add_tenants(store, len(truth.head_V_D), seed)
    flags = ("--model", str(model), "--store", url, *_FLAGS)
    replicas, began = list[Replica](), time.time()
    traffic = Traffic(truth, replicas)
    try:
        for number in (1, 2):
            replicas.append(Replica(_WORK / f"server-{number}.log", flags))
        for tenant in (*good, *bad.values()):
            await traffic.introduce(tenant)
        rss = await _phases(traffic, good, bad, 60 * minutes, random.Random(seed))
        await traffic.drain(60)
    finally:
        for replica in replicas:
            await replica.stop()
    tenants = [*good, *bad.values()]
    faults = _quota_faults(url, tenants)
    # The tokens of a minute are at most its quota and those of one call that was admitted below it.
    minutes_begun = int(time.time() // 60) - int(began // 60) + 1
    max_tokens = minutes_begun * ((FLOODED.tokens_per_minute or 0) + max_call_tokens(truth))
    if bad["flood"].account.tokens > max_tokens:
        faults.setdefault("flood", []).append(f"{bad['flood'].account.tokens} tokens answered, more than {max_tokens}")
    return {"minutes": minutes, "seed": seed} | _figures(traffic, tenants, faults, rss)


async def _phases(
    traffic: Traffic, good: Sequence[Tenant], bad: dict[str, Tenant], seconds: float, chance: random.Random
) -> list[float]:
    """Run all phases. Return the resident memory of the server that is never killed, once a second, in MiB."""
    rss: list[float] = []
    tasks = [asyncio.create_task(traffic.behave(tenant, _RATE)) for tenant in good]
    tasks.append(asyncio.create_task(_watch(traffic.replicas[0], rss)))
    await asyncio.sleep(_WARM_UP_SECONDS)
    traffic.record.phase = "quiet"
    await asyncio.sleep(_QUIET * seconds)
    tasks += [
        asyncio.create_task(work)
        for work in (
            _flood_in_bouts(traffic, bad["flood"]),
            adversaries.cut(traffic, bad["cut"], _CUT_RATE),
            adversaries.garbage(traffic, bad["garbage"], _GARBAGE_RATE),
        )
    ]
    killing = asyncio.create_task(_kill(traffic.replicas[1], seconds * (1 - _QUIET), chance))
    done, _ = await asyncio.wait(tasks, timeout=seconds * (1 - _QUIET), return_when=asyncio.FIRST_EXCEPTION)
    await killing  # until the server is ready again
    for task in tasks:
        task.cancel()
    for task in (*done, *tasks):
        with suppress(asyncio.CancelledError):
            await task
    return rss


async def _watch(replica: Replica, rss: list[float]) -> None:
    while True:
        rss.append(replica.rss_mib())
        await asyncio.sleep(1)


async def _flood_in_bouts(traffic: Traffic, tenant: Tenant) -> None:
    while True:
        traffic.record.phase = "flood"
        with suppress(TimeoutError):
            await asyncio.wait_for(adversaries.flood(traffic, tenant), tenant.chance.uniform(*_BOUT_SECONDS))
        traffic.record.phase = "between"
        await asyncio.sleep(tenant.chance.uniform(*_PAUSE_SECONDS))


async def _kill(replica: Replica, seconds: float, chance: random.Random) -> None:
    """Kill a server several times while it works on calls, the last time early enough for its restart."""
    times = max(2, round(seconds / 60 / _MINUTES_A_KILL))
    for _ in range(times):
        await asyncio.sleep(seconds / (times + 1) * chance.uniform(0.5, 1))
        while not replica.in_flight:
            await asyncio.sleep(0.001)
        await replica.kill_and_restart()


def _quota_faults(url: str, tenants: Sequence[Tenant]) -> dict[str, list[str]]:
    """Differences between the store's account and the clients', by tenant."""
    command = [sys.executable, "-m", "plm_owner_server.cli", "tenants", "usage", "--store", url, "--json"]
    days = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    faults = {t.name: list(t.account.faults(day for day in days if day["tenant"] == t.name)) for t in tenants}
    return {name: differences for name, differences in faults.items() if differences}


def _figures(
    traffic: Traffic, tenants: Sequence[Tenant], faults: dict[str, list[str]], rss: Sequence[float]
) -> dict[str, Any]:
    record, quarter = traffic.record, len(rss) // 4
    p95_ms = {phase: 1000 * quantiles(values, n=20)[-1] for phase, values in record.seconds.items() if len(values) > 1}
    refused: Counter[str] = Counter()
    for name, count in record.refused.items():
        refused[name.partition("-")[0] if name.startswith("good-") else name] += count
    return {
        "wrong_answers": record.wrong.total(),
        "quota_errors": len(faults),
        "rss_growth": median(rss[-quarter:]) / median(rss[quarter : 2 * quarter]),
        "p95_ratio": p95_ms["flood"] / p95_ms["quiet"],
        "unexpected": record.unexpected.total(),
        "p95_ms": p95_ms,
        "answers_checked": dict(record.answers),
        "refused": dict(refused),
        "kills": traffic.replicas[1].kills,
        "unanswered_at_kills": sum(len(tenant.account.unanswered) for tenant in tenants if tenant.name != "cut"),
        "tokens": sum(tenant.account.tokens for tenant in tenants),
        "rss_mib_by_tenth": [round(median(rss[i * len(rss) // 10 : (i + 1) * len(rss) // 10])) for i in range(10)],
        "what_was_wrong": dict(record.wrong),
        "what_was_unexpected": dict(record.unexpected),
        "which_quotas": faults,
    }


if __name__ == "__main__":
    main()
