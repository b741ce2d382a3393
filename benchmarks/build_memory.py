"""Building a memory end to end against the bare forward pass of transformers, in rows per second.

The owner's server is a separate process. The baseline runs the model's body alone on the same sequences, in padded
batches of similar length. Both take turns, with the same threads. Then: many clients at once, and the memory of
one client whose data set is ten times as large.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.build_memory_baselines import Baseline
from data_owner_client import Pair, connect, load_task, read_pairs
from data_owner_client.data.tasks import Task
from data_owner_client.memory.build import build_memory
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from harness import report
from harness.datasets import home_assistant
from harness.processes import run_together, server
from harness.tcp_proxy import counting_proxy
from protocol.cores import usable_cores

_WORK = report.FOLDER / "build_memory"
_DATA, _LOG, _MEMORY = _WORK / "data", _WORK / "server.log", _WORK / "memory"
_CLIENTS = (1, 4, 16)


@dataclass(frozen=True)
class Effort:
    """Size of a measurement: the number of rounds, and numbers of pairs."""

    rounds: int
    single: int
    per_client: int
    generated: int
    small: int  # pairs of the smaller memory; the larger one has ten times as many


@dataclass(frozen=True)
class Built:
    """One client's report of its build.

    Attributes:
        rows: rows of its memory.
        seconds: time from the common start to the last fsync.
        peak_rss_mib: largest resident memory of the process, in MiB.
    """

    rows: int
    seconds: float
    peak_rss_mib: float


_FULL = Effort(rounds=3, single=256, per_client=200, generated=16, small=400)
_QUICK = Effort(rounds=1, single=128, per_client=64, generated=4, small=100)


@dataclass
class Figures:
    """Rows per second of every round, and how they compare with the baseline's before and after."""

    rows_per_s: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)

    def add(self, ours: float, before: float, after: float) -> None:
        """Record one round."""
        self.rows_per_s.append(ours)
        self.ratio.append(2 * ours / (before + after))

    def medians(self, suffix: str = "") -> dict[str, float]:
        """Medians over the rounds, for the report."""
        return {f"rows_per_s{suffix}": median(self.rows_per_s), f"ratio{suffix}": median(self.ratio)}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and one round")
    parser.add_argument("--rounds", type=int, help="number of rounds")
    arguments = parser.parse_args()
    effort = _QUICK if arguments.quick else _FULL
    rounds = arguments.rounds or effort.rounds
    threads = usable_cores()
    torch.set_num_threads(threads)
    home_assistant.prepare(_DATA)
    figures = {"rounds": rounds, "threads": threads}
    figures |= _one_client(effort, rounds, threads)
    figures["clients"] = _many_clients(effort, rounds, threads)
    figures |= _peak_memory(effort, threads)
    report.write("build_memory", figures)


def _one_client(effort: Effort, rounds: int, threads: int) -> dict[str, Any]:
    task = load_task(_DATA / "task.toml")
    pairs = read_pairs(_DATA / "train.jsonl")[: effort.single]
    with server(_LOG, "--threads", str(threads)) as (rest_port, _), connect(f"http://127.0.0.1:{rest_port}") as plm:
        baseline = Baseline([tokenize_pair(plm, task, pair) for pair in pairs])
    rest, grpc, shared, generated = Figures(), Figures(), Figures(), list[float]()
    for _ in range(rounds):
        with server(_LOG, "--threads", str(threads), "--prefix-cache-mib", "0") as (rest_port, grpc_port):
            first = baseline.rows_per_s()
            over_rest = _build(f"http://127.0.0.1:{rest_port}", task, pairs)
            second = baseline.rows_per_s()
            over_grpc = _build(f"grpc://127.0.0.1:{grpc_port}", task, pairs)
            third = baseline.rows_per_s()
        rest.add(over_rest, first, second)
        grpc.add(over_grpc, second, third)
        with (
            server(_LOG, "--threads", str(threads)) as (_, grpc_port),
            counting_proxy("127.0.0.1", grpc_port) as (port, traffic),
        ):
            with_prefix = _build(f"grpc://127.0.0.1:{port}", task, pairs)
        shared.add(with_prefix, third, baseline.rows_per_s())
        generated.append(baseline.generate_rows_per_s(effort.generated))
    return {
        "pairs": len(pairs),
        "rows": baseline.rows,
        "rest": rest.medians(),
        "grpc": grpc.medians() | shared.medians("_shared_prefix"),
        "wire_bytes_over_2d": traffic.to_client / baseline.rows / (2 * baseline.hidden_size),
        "reference_generate_rows_per_s": median(generated),
    }


def _build(url: str, task: Task, pairs: list[Pair]) -> float:
    """Rows per second of a whole build, from the first byte to the last fsync."""
    shutil.rmtree(_MEMORY, ignore_errors=True)
    with connect(url) as plm:
        started = time.perf_counter()
        memory = build_memory(plm, task, pairs, _MEMORY, context_mode="teacher-forced", share_targets=True)
        return memory.manifest.rows / (time.perf_counter() - started)


def _many_clients(effort: Effort, rounds: int, threads: int) -> dict[str, Any]:
    """Total throughput of all clients, half of them over REST and half over gRPC."""
    rows_per_s: dict[int, list[float]] = {count: [] for count in _CLIENTS}
    spread: dict[int, list[float]] = {count: [] for count in _CLIENTS}
    with server(_LOG, "--threads", str(threads)) as (rest_port, grpc_port):
        urls = [f"http://127.0.0.1:{rest_port}", f"grpc://127.0.0.1:{grpc_port}"]
        _build_together(urls[:1], [range(8)])  # warms up, and caches the common prefix of the prompts
        for _ in range(rounds):
            for count in _CLIENTS:
                spans = list(_spans(count, effort.per_client))
                built = _build_together([urls[i % 2] for i in range(count)], spans)
                times = [one.seconds for one in built]
                rows_per_s[count].append(sum(one.rows for one in built) / max(times))
                spread[count].append(max(times) / min(times))
    return {
        str(count): {
            "rows_per_s": median(rows_per_s[count]),
            "rows_ratio_to_1": median(
                ours / alone for ours, alone in zip(rows_per_s[count], rows_per_s[1], strict=True)
            ),
            "slowest_over_fastest": median(spread[count]),
        }
        for count in _CLIENTS
    }


def _spans(count: int, pairs: int) -> Iterator[range]:
    yield from (range(i * pairs, (i + 1) * pairs) for i in range(count))


def _peak_memory(effort: Effort, threads: int) -> dict[str, Any]:
    """Peak memory of a client that builds from few pairs, and from ten times as many."""
    with server(_LOG, "--threads", str(threads)) as (_, grpc_port):
        small, large = (
            _build_together([f"grpc://127.0.0.1:{grpc_port}"], [range(pairs)])[0]
            for pairs in (effort.small, 10 * effort.small)
        )
    return {
        "client_peak_rss_mib": {str(small.rows): small.peak_rss_mib, str(large.rows): large.peak_rss_mib},
        "client_peak_rss_10x": large.peak_rss_mib / small.peak_rss_mib,
    }


def _build_together(urls: Sequence[str], spans: Sequence[range]) -> list[Built]:
    """Build with several clients at once: client i connects to `urls[i]` and uses the pairs of `spans[i]`."""
    arguments = [
        (url, str(_DATA), str(span.start), str(span.stop), str(_MEMORY / str(number)))
        for number, (url, span) in enumerate(zip(urls, spans, strict=True))
    ]
    return [Built(**record) for record in run_together("benchmarks.build_worker", arguments)]


if __name__ == "__main__":
    main()
