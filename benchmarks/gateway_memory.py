"""Memory of a gateway that answers thousands of requests, of which a tenth are cut off."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import httpx
import psutil

from benchmarks.gateway_worker import ask
from data_owner_client import Pair, Task, TrainingSettings, build_memories, connect, train, translate
from harness.gateways import running_gateway
from harness.processes import server
from harness.tiny_models import save_model

_MODEL = "tiny"
_FLAGS = ("--dtype", "float32", "--device", "cpu", "--threads", "1")
_WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
_TEXTS = 64
_CUT = 10  # of so many requests, one is cut off
_CUT_WITHIN_SECONDS = 0.1
_SAMPLES = 200
_SETTLING = 0.2  # share of the requests at the start, in which caches fill
_TIMEOUT_SECONDS = 120.0
_IDLE_WITHIN_SECONDS = 30.0


@dataclass
class _Run:
    """The course of a run.

    Attributes:
        pid: process of the gateway.
        requests: number of requests.
        outcomes: number of requests by outcome.
        done: number of requests at each sample.
        rss_mib: resident memory of the gateway at each sample, in MiB.
    """

    pid: int
    requests: int
    outcomes: Counter[str] = field(default_factory=Counter)
    done: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    def count(self, outcome: str) -> None:
        """Count a request that is over, and sample the memory from time to time."""
        self.outcomes[outcome] += 1
        if self.outcomes.total() % max(1, self.requests // _SAMPLES) == 0:
            self.done.append(self.outcomes.total())
            self.rss_mib.append(psutil.Process(self.pid).memory_info().rss / 2**20)


def measure_memory(folder: Path, requests: int, clients: int) -> dict[str, Any]:
    """Growth of a gateway's memory in MiB for 1,000 requests, and what became of these.

    Args:
        folder: folder for the model, the adapter and the logs.
        requests: number of requests, half of them streamed.
        clients: requests at the same time.
    """
    model, adapter = folder / "tiny-model", folder / "tiny-adapter"
    save_model("llama", model)
    chance = random.Random(0)
    texts = [f"{' '.join(chance.choices(_WORDS, k=3))} {number}" for number in range(_TEXTS)]
    with server(folder / "tiny-server.log", "--model", str(model.absolute()), *_FLAGS) as ports:
        url = f"http://127.0.0.1:{ports.rest}"
        expected = _prepare(url, adapter, texts)
        flags = ("--dtype", "float32", "--threads", "1")
        with running_gateway(folder / "tiny-gateway.log", url, {_MODEL: adapter}, *flags) as gateway:
            run = _Run(gateway.process.pid, requests)
            asyncio.run(_ask_all(gateway.url, dict(zip(texts, expected, strict=True)), run, clients))
            left_behind = asyncio.run(_left_behind(gateway.url))
    return _figures(run) | {"left_behind": left_behind}


def _prepare(url: str, adapter: Path, texts: Sequence[str]) -> list[str]:
    """Train the adapter. Return the answers of `translate`."""
    task = Task(name="tiny", source_label="In", target_label="Out")
    pairs = [
        Pair(" ".join(_WORDS[i % 9 :][: 2 + i % 4]), " ".join(_WORDS[(3 * i) % 7 :][: 1 + i % 3])) for i in range(24)
    ]
    settings = TrainingSettings(
        rank=16, epochs=3, batch_rows=16, learning_rate=0.02, selection_texts=0, minutes=0, retrieved_examples=0
    )
    memory = adapter.with_name("tiny-memory")
    with connect(url, dtype="float32") as plm:
        build_memories(
            plm, task, pairs, memory, validation=pairs[:4], context_mode="teacher-forced", share_targets=True
        )
        trained, _ = train(plm, memory, adapter, settings=settings)
        return translate(plm, texts, adapter=trained).texts


async def _ask_all(url: str, expected: dict[str, str], run: _Run, clients: int) -> None:
    numbers, texts = iter(range(run.requests)), [*expected]
    async with httpx.AsyncClient(
        base_url=url,
        timeout=_TIMEOUT_SECONDS,
        limits=httpx.Limits(max_connections=clients),
        trust_env=False,
    ) as client:

        async def ask_in_turn() -> None:
            for number in numbers:
                chance = random.Random(number)
                text, streamed = chance.choice(texts), chance.random() < 0.5
                if number % _CUT == 0:
                    await _cut(client, text, streamed, chance.uniform(0, _CUT_WITHIN_SECONDS))
                    run.count("cut")
                    continue
                answer = await ask(client, _MODEL, text, streamed=streamed)
                run.count("right" if answer == expected[text] else "wrong")

        await asyncio.gather(*(ask_in_turn() for _ in range(clients)))


async def _cut(client: httpx.AsyncClient, text: str, streamed: bool, seconds: float) -> None:
    """Ask, and hang up after some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await ask(client, _MODEL, text, streamed=streamed)


async def _left_behind(url: str) -> int:
    """Answers that the gateway still works on, once there is time to end those of clients that are gone."""
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
        with suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_WITHIN_SECONDS):
                while await _load(client):
                    await asyncio.sleep(0.1)
        return await _load(client)


async def _load(client: httpx.AsyncClient) -> int:
    health = (await client.get("/health")).raise_for_status().json()
    return int(health["active"]) + int(health["waiting"])


def _figures(run: _Run) -> dict[str, Any]:
    start = int(_SETTLING * len(run.done))
    slope, _ = linear_regression([done / 1000 for done in run.done[start:]], run.rss_mib[start:])
    tenths = [run.rss_mib[i * len(run.rss_mib) // 10 : (i + 1) * len(run.rss_mib) // 10] for i in range(10)]
    return {
        "mib_per_1000_requests": slope,
        "rss_mib_by_tenth": [round(median(tenth)) for tenth in tenths if tenth],
        "requests": run.requests,
        "cut": run.outcomes["cut"],
        "wrong": run.outcomes["wrong"],
    }
