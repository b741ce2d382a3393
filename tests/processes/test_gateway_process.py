"""The gateway as a process: its start, its end by signals, and a port in use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from harness.processes import free_port

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
_COMMAND = [sys.executable, "-m", "data_owner_client.cli", "gateway"]
_BEHIND = """
import asyncio, sys
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from data_owner_client.gateway.server_process import listening, logged_to_stderr, serve

async def pieces():
    yield b"begun\\n"
    await asyncio.to_thread(sys.stdin.readline)
    yield b"ended\\n"

async def answer(request):
    return StreamingResponse(pieces())

with listening("127.0.0.1", int(sys.argv[1])) as listener, logged_to_stderr("info"):
    print("listening", flush=True)
    serve(Starlette(routes=[Route("/", answer)]), listener)
"""


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes, which has ended at the end."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: subprocess.Popen[str], word: str) -> list[str]:
    """The lines of standard error up to one with this word."""
    assert process.stderr is not None
    lines = list[str]()
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_clean_end(sig: signal.Signals, tiny_server: str, tmp_path: Path) -> None:
    command, port = [*_COMMAND, "--server", tiny_server, "--port"], str(free_port())
    with started([*command, port], tmp_path) as gateway:
        said = "".join(lines_until(gateway, "sees every prompt"))
        assert f"http://127.0.0.1:{port}/v1" in said
        assert tiny_server in said
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).json()["owner"] == "ok"
        with started([*command, port], tmp_path) as second:
            _, errors = second.communicate(timeout=60)
            assert second.returncode == 1
            assert len(errors.splitlines()) == 1
            assert f"port {port} of 127.0.0.1" in errors
        gateway.send_signal(sig)
        _, errors = gateway.communicate(timeout=60)
        assert gateway.returncode == 0
        assert "Traceback" not in errors


def test_answers_under_way_may_end(tmp_path: Path) -> None:
    port = str(free_port())
    with started([sys.executable, "-c", _BEHIND, port], tmp_path) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        with httpx.stream("GET", f"http://127.0.0.1:{port}/", timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines) == "begun"
            server.send_signal(signal.SIGTERM)
            lines_until(server, "stopping")
            server.stdin.write("\n")
            server.stdin.flush()
            assert next(lines) == "ended"
        assert server.wait(60) == 0
