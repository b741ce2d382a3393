"""Building a memory end to end against the bare forward pass of transformers, in rows per second.

The owner's server is a process of its own; the peer runs the same sequences in padded batches of similar length, with
nothing around the model's body. Both take turns, with the same threads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import httpx
import torch
from torch import nn

from benchmarks import report
from benchmarks.proxy import counting_proxy
from data_owner_client import Pair, connect, load_task, read_pairs
from data_owner_client.memory import build_memory
from data_owner_client.memory.build import TokenizedPair, tokenize_pair
from data_owner_client.tasks import Task
from demo import home_assistant
from plm_owner_server.batching import plan_batches
from plm_owner_server.engines.transformers import load_model
from plm_owner_server.models import resolve
from plm_owner_server.settings import DEFAULT_MODEL, ServerSettings

_WORK = report.FOLDER / "build_memory"


@dataclass
class Figures:
    """Rows per second of every round, and how they compare with the peer's before and after."""

    rows_per_s: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)

    def add(self, ours: float, before: float, after: float) -> None:
        """One round."""
        self.rows_per_s.append(ours)
        self.ratio.append(2 * ours / (before + after))

    def medians(self, suffix: str = "") -> dict[str, float]:
        """What is reported."""
        return {f"rows_per_s{suffix}": median(self.rows_per_s), f"ratio{suffix}": median(self.ratio)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and one round")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything takes its turn")
    arguments = parser.parse_args()
    pairs_wanted, rounds = (128, 1) if arguments.quick else (256, arguments.rounds)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    home_assistant.prepare(_WORK / "data")
    task = load_task(_WORK / "data" / "task.toml")
    pairs = read_pairs(_WORK / "data" / "train.jsonl")[:pairs_wanted]
    with _server("--threads", str(threads)) as (rest_port, _), connect(f"http://127.0.0.1:{rest_port}") as plm:
        tokenized = [tokenize_pair(plm, task, pair, place="a pair") for pair in pairs]
    peer = Peer(tokenized)
    rest, grpc, shared = Figures(), Figures(), Figures()
    for _ in range(rounds):
        with _server("--threads", str(threads), "--prefix-cache-mib", "0") as (rest_port, grpc_port):
            first = peer.rows_per_s()
            over_rest = _build(f"http://127.0.0.1:{rest_port}", task, pairs)
            second = peer.rows_per_s()
            over_grpc = _build(f"grpc://127.0.0.1:{grpc_port}", task, pairs)
            third = peer.rows_per_s()
        rest.add(over_rest, first, second)
        grpc.add(over_grpc, second, third)
        with (
            _server("--threads", str(threads)) as (_, grpc_port),
            counting_proxy("127.0.0.1", grpc_port) as (port, traffic),
        ):
            with_prefix = _build(f"grpc://127.0.0.1:{port}", task, pairs)
        shared.add(with_prefix, third, peer.rows_per_s())
    report.write(
        "build_memory",
        {
            "pairs": len(pairs),
            "rows": peer.rows,
            "rounds": rounds,
            "threads": threads,
            "rest": rest.medians(),
            "grpc": grpc.medians() | shared.medians("_shared_prefix"),
            "wire_bytes_over_2d": traffic.to_client / peer.rows / (2 * peer.hidden_size),
        },
    )


class Peer:
    """The bare forward pass of transformers over the sequences that a teacher-forced memory needs.

    Args:
        pairs: as the client tokenises them.
    """

    def __init__(self, pairs: list[TokenizedPair]) -> None:
        settings = ServerSettings(_env_file=None)
        folder = resolve(DEFAULT_MODEL, settings.cache_dir).folder
        self._body = load_model(folder, device="cpu", dtype="float32").base_model
        self._sequences = [torch.tensor(pair.prompt + pair.target[:-1]) for pair in pairs]
        lengths = list(map(len, self._sequences))
        self._plan = plan_batches(lengths, settings.batch_tokens, settings.padding_tokens)
        self.rows = sum(len(pair.target) for pair in pairs)
        self.hidden_size = int(self._body.config.hidden_size)

    @torch.inference_mode()
    def rows_per_s(self) -> float:
        """One pass over all sequences."""
        started = time.perf_counter()
        for batch in self._plan:
            sequences = [self._sequences[i] for i in batch]
            ids_B_T = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
            mask_B_T = nn.utils.rnn.pad_sequence([torch.ones_like(ids_T) for ids_T in sequences], batch_first=True)
            self._body(input_ids=ids_B_T, attention_mask=mask_B_T, use_cache=False)
        return self.rows / (time.perf_counter() - started)


def _build(url: str, task: Task, pairs: list[Pair]) -> float:
    """Rows per second of a whole build, from the first byte to the last fsync."""
    folder = _WORK / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    with connect(url) as plm:
        started = time.perf_counter()
        memory = build_memory(plm, task, pairs, folder, context_mode="teacher-forced", share_targets=True)
        return memory.manifest.rows / (time.perf_counter() - started)


@contextmanager
def _server(*flags: str) -> Iterator[tuple[int, int]]:
    """The owner's server; gives its REST and gRPC ports."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    named = ["--port", str(ports[0]), "--grpc-port", str(ports[1])]
    command = [sys.executable, "-m", "plm_owner_server.cli", "serve", *named, *flags]
    _WORK.mkdir(parents=True, exist_ok=True)
    with (_WORK / "server.log").open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while not _ready(ports[0]):
            if server.poll() is not None:
                sys.exit(f"The server stopped; see {_WORK}/server.log.")
            time.sleep(0.2)
        yield ports
    finally:
        server.terminate()
        server.wait()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
