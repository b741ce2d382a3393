"""An engine that breaks under a client's call, and a restart of the server, as compose or systemd do it.

The client retries, and its result is the same as without the fault.
"""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.processes import free_port
from harness.tiny_models import TinyModels
from tests import guard
from tests.command_line import WORDS, write_pairs
from tests.processes.ailing_server import PASSES_LEFT
from tests.processes.parties import client_command, end, start_server, wait_until_ready

_FIRST_DELAY_SECONDS = 0.1  # of Docker's restart policies


class RestartedServer:
    """A server that is started again whenever it ends, on the same ports."""

    def __init__(self, log: Path, passes_left: Path, *flags: str) -> None:
        self._log, self._flags = log, flags
        self.passes_left = passes_left
        self.ports = {"http": free_port(), "grpc": free_port()}
        self.statuses: list[int] = []
        self._stopping = False
        self._process = self._start()
        wait_until_ready(self._process, self.url("http"), log)
        self._loop = threading.Thread(target=self._restart_whenever_it_ends)
        self._loop.start()

    def url(self, scheme: str) -> str:
        return guard.url(scheme, self.ports[scheme])

    def break_after(self, passes: int) -> None:
        """Let the engine break in a coming pass."""
        self.passes_left.write_text(str(passes))

    def stop(self) -> None:
        self._stopping = True
        self._process.terminate()
        self._loop.join()

    def _start(self) -> subprocess.Popen[bytes]:
        ports = self.ports["http"], self.ports["grpc"]
        return start_server(self._log, *ports, *self._flags, module="tests.processes.ailing_server")

    def _restart_whenever_it_ends(self) -> None:
        while True:
            self.statuses.append(self._process.wait())
            if self._stopping:
                return
            time.sleep(_FIRST_DELAY_SECONDS)
            self._process = self._start()


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartedServer]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PASSES_LEFT, str(folder / "passes-left"))
        flags = ["--model", str(tiny_models["llama"]), "--max-sequences", "32"]
        server = RestartedServer(folder / "log", folder / "passes-left", *flags)
        yield server
        server.stop()


def run(url: str, verb: str, *arguments: object) -> int:
    command = client_command(url, verb, *arguments)
    return end(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True), within_s=300)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.transformers_only  # in vLLM the last bits depend on what runs beside a text
def test_a_client_outlasts_an_engine_that_breaks(server: RestartedServer, tmp_path: Path) -> None:
    task, texts, rng = tmp_path / "task.toml", tmp_path / "texts.txt", random.Random(3)
    task.write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')
    texts.write_text("".join(f"{' '.join(rng.choices(WORDS, k=4))} {i}\n" for i in range(30)))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 400, seed=5)
    build = ["--task", task, "--input", pairs, "--share-targets", "--memory"]
    translate = ["--task", task, "--input", texts, "--max-new-tokens", 40, "--batch-size", 16, "--output"]

    # First all memories: a translation leaves states in the prefix cache that differ in their last bits.
    assert run(server.url("http"), "build-memory", *build, tmp_path / "memory") == 0
    for broken, scheme in enumerate(("http", "grpc"), 1):
        server.break_after(5)
        assert run(server.url(scheme), "build-memory", *build, tmp_path / f"memory-{scheme}") == 0
        assert files_of(tmp_path / f"memory-{scheme}") == files_of(tmp_path / "memory")
        assert server.statuses == [1] * broken

    assert run(server.url("http"), "translate", *translate, tmp_path / "out.txt") == 0
    for broken, scheme in enumerate(("http", "grpc"), 3):
        server.break_after(25)
        assert run(server.url(scheme), "translate", *translate, tmp_path / f"out-{scheme}.txt") == 0
        assert (tmp_path / f"out-{scheme}.txt").read_bytes() == (tmp_path / "out.txt").read_bytes()
        assert server.statuses == [1] * broken
