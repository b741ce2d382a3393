"""A build of a memory among faults, with the real processes: it ends in the same memory, row for row.

Or in a clear error, after which the same command finishes the job.
"""

from __future__ import annotations

import math
import random
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harness.tcp_proxy import Fault, faulty_proxy
from harness.tiny_models import TinyModels
from tests import guard, support
from tests.command_line import write_pairs
from tests.processes.parties import Owner, client_command, end, owner_that_can_be_killed

EXAMPLES = 1100
ANSWERS_BYTES = 600_000
"""About as many bytes as the server sends in a whole build."""
IMPATIENT = ["--timeout", "1.5", "--retry-for", "60"]


@pytest.fixture(scope="module")
def owner(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    # Small requests, so that a build has many, and a fault meets it anywhere.
    log = tmp_path_factory.mktemp("server") / "log"
    with owner_that_can_be_killed(log, "--model", str(tiny_models["llama"]), "--max-sequences", "32") as owner:
        yield owner


class Job:
    """One `build-memory` command, run as often as it takes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs = write_pairs(folder.parent / "pairs.jsonl", EXAMPLES, seed=5)
        self._task = folder.parent / "task.toml"
        self._task.write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')

    def command(self, url: str) -> list[str]:
        what = ["--task", self._task, "--input", self._pairs, "--memory", self._folder, "--share-targets"]
        return client_command(url, "build-memory", *what, *IMPATIENT)

    def start(self, url: str, *, prefix: str = "") -> subprocess.Popen[str]:
        command = self.command(url)
        if prefix:
            command = ["bash", "-c", f"{prefix}; exec {shlex.join(command)}"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self._folder)): path.read_bytes()
            for path in sorted(self._folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }


def assert_same(ours: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    """Byte for byte; but in vLLM the last bits depend on what runs beside a text."""
    if support.engine == "transformers":
        assert ours == theirs
        return
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        if name.endswith(".safetensors"):
            columns, expected = (safetensors.torch.load(file) for file in (ours[name], content))
            torch.testing.assert_close(columns, expected, rtol=2e-3, atol=2e-3)  # of float16
        elif name.endswith(".jsonl"):
            assert ours[name] == content


@pytest.fixture(scope="module")
def undisturbed(owner: Owner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    job = Job(tmp_path_factory.mktemp("undisturbed") / "memory")
    assert end(job.start(owner.url("http"))) == 0
    files = job.files()
    # Manifest and texts of both, three shards to train on, one to validate on.
    assert len(files) == 2 * 2 + 3 + 1, list(files)
    return files


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("kind", ["cut", "stall", "garble", "garble-request"])
def test_one_fault_of_each_kind_in_the_middle(
    owner: Owner, undisturbed: dict[str, bytes], tmp_path: Path, scheme: str, kind: str
) -> None:
    job = Job(tmp_path / "memory")
    with faulty_proxy(owner.port(scheme), [Fault(kind, ANSWERS_BYTES // 2)]) as port:  # type: ignore[arg-type]
        assert end(job.start(guard.url(scheme, port))) == 0
    assert_same(job.files(), undisturbed)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("kind", ["cut", "stall", "garble"])
def test_a_network_that_never_works_ends_in_a_clear_error(owner: Owner, tmp_path: Path, scheme: str, kind: str) -> None:
    job = Job(tmp_path / "memory")
    faults = [Fault(kind, 50)] * 100  # type: ignore[arg-type]
    with faulty_proxy(owner.port(scheme), faults) as port:
        assert end(job.start(guard.url(scheme, port))) == 1


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    owner: Owner, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    job, url = Job(tmp_path / "memory"), owner.url("grpc")
    process = job.start(url, prefix="ulimit -f 128")  # no file of more than 128 KiB: a shard cannot be written
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "cannot be written" in errors
    assert "Make room" in errors
    assert "Traceback" not in errors
    assert end(job.start(url)) == 0
    assert_same(job.files(), undisturbed)


@pytest.mark.parametrize("seed", range(20))
def test_no_schedule_of_faults_loses_or_doubles_a_row(
    owner: Owner, undisturbed: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    rng, job = random.Random(seed), Job(tmp_path / "memory")
    scheme = rng.choice(["http", "grpc"])
    kinds = rng.choices(["cut", "stall", "garble", "garble-request"], weights=[4, 1, 2, 2], k=rng.randint(1, 4))
    faults = [Fault(kind, int(math.exp(rng.uniform(0, math.log(ANSWERS_BYTES))))) for kind in kinds]  # type: ignore[arg-type]
    kills = rng.choices(["client", "server", "none"], k=2)
    with faulty_proxy(owner.port(scheme), faults) as port:
        url = guard.url(scheme, port)
        for kill in kills:
            if kill == "none":
                continue
            process = job.start(url)
            time.sleep(rng.uniform(1.5, 4.0))
            if kill == "client":
                process.kill()
                process.communicate()
            else:
                owner.kill()
                owner.start()
                end(process)
        for _ in range(len(faults) + 1):
            if end(job.start(url)) == 0:
                break
    assert_same(job.files(), undisturbed)
