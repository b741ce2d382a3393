"""The owner's server and the data owner's clients as processes of their own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@contextmanager
def server(
    log: Path, *flags: str, python: str = sys.executable, cores: Sequence[int] = ()
) -> Iterator[tuple[int, int]]:
    """The owner's server; gives its REST and gRPC ports.

    Args:
        log: what it prints.
        flags: of `pema-server serve`.
        python: of the environment that it runs in.
        cores: that it may use; all by default.
    """
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    named = ["--port", str(ports[0]), "--grpc-port", str(ports[1])]
    # Without tenants, also where whoever runs this has some.
    named += ["--store", f"sqlite:///{log.parent / 'owner.db'}"]
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores))] if cores else []
    command = [*pinned, python, "-m", "plm_owner_server.cli", "serve", *named, *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while not _ready(ports[0]):
            if process.poll() is not None:
                sys.exit(f"The server stopped; see {log}.")
            time.sleep(0.2)
        yield ports
    finally:
        process.terminate()
        process.wait()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Built:
    """What one client reports of its build.

    Attributes:
        seconds: from the common start to the last fsync.
        peak_rss_mib: most memory that the process ever had, in MiB.
    """

    rows: int
    seconds: float
    peak_rss_mib: float


def build_at_once(urls: Sequence[str], data: Path, spans: Sequence[range], folder: Path) -> list[Built]:
    """Several clients that build a memory each, from pairs of their own, starting at the same moment.

    Args:
        urls: where each connects to.
        data: folder with `task.toml` and `train.jsonl`.
        spans: the pairs of each.
        folder: for their memories.
    """
    arguments = [
        (url, str(data), str(span.start), str(span.stop), str(folder / str(number)))
        for number, (url, span) in enumerate(zip(urls, spans, strict=True))
    ]
    return [Built(**record) for record in at_once("benchmarks.build_worker", arguments)]


def at_once(module: str, arguments: Sequence[Sequence[str]], python: str = sys.executable) -> list[dict[str, Any]]:
    """What several workers report that start at the same moment: each says it is ready, and is told to go.

    Args:
        module: of the worker.
        arguments: of each of them.
        python: of the environment that they run in.
    """
    workers = [
        subprocess.Popen([python, "-m", module, *own], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for own in arguments
    ]
    for worker in workers:
        if worker.stdout is None or worker.stdout.readline() != "ready\n":
            sys.exit("A client did not start.")
    for worker in workers:
        if worker.stdin is not None:
            worker.stdin.write("go\n")
            worker.stdin.flush()
    return [json.loads(worker.communicate()[0]) for worker in workers]
