"""The two parties as they really run: `pema-server` and `pema-client` as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests import guard

_READY_WITHIN_S = 240


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def server(
    log: Path,
    *arguments: str,
    port: int | None = None,
    grpc_port: int = 0,
    ca: Path | None = None,
    own: tuple[Path, Path] | None = None,
) -> Iterator[str]:
    """`pema-server serve` with these arguments, once it is ready; gives its URL for REST.

    With the authority `ca` of its certificate, it is one that speaks TLS; with a certificate of our `own` and its key,
    one that demands it.
    """
    port = port or free_port()
    process = start_server(log, port, grpc_port, *arguments)
    url = f"https://127.0.0.1:{port}" if ca else guard.url("http", port)
    try:
        wait_until_ready(process, url, log, ca, own)
        yield url
    finally:
        _stop(process, log)


def start_server(
    log: Path, port: int, grpc_port: int, *arguments: str, module: str = "plm_owner_server.cli"
) -> subprocess.Popen[bytes]:
    """`pema-server serve` on these ports; `module` may be another one with the same command line."""
    flags = ["--port", str(port), "--grpc-port", str(grpc_port)]
    if guard.current:  # of flags that are given twice, the last one holds
        flags += guard.current.flags
    command = [sys.executable, "-m", module, "serve", *flags, *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def wait_until_ready(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    ca: Path | None = None,
    own: tuple[Path, Path] | None = None,
) -> None:
    """Return once the server is ready; fail if it stops or takes too long."""
    deadline = time.monotonic() + _READY_WITHIN_S
    verify = guard.trust()
    if ca:
        verify = ssl.create_default_context(cafile=ca)
        if own:
            verify.load_cert_chain(*own)
    while not _ready(url, verify):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


class Owner:
    """The owner's server, which can be killed and comes back on the same ports."""

    def __init__(self, log: Path, flags: Sequence[str]) -> None:
        self._flags = flags
        self._log = log
        self.ports = {"http": free_port(), "grpc": free_port()}
        self.restarts = 0
        self._restarting = threading.Lock()
        self.start()

    def url(self, scheme: str) -> str:
        """Where clients find it: `http` or `grpc`."""
        return guard.url(scheme, self.ports[scheme])

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        self.process = start_server(self._log, self.ports["http"], self.ports["grpc"], *self._flags)
        wait_until_ready(self.process, self.url("http"), self._log)

    def kill(self) -> None:
        """Kill it, as a lack of memory would."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Kill it, and have it back."""
        with self._restarting:
            self.kill()
            self.start()
            self.restarts += 1


@contextmanager
def owner_that_can_be_killed(log: Path, *flags: str) -> Iterator[Owner]:
    """A server that is stopped properly at the end."""
    owner = Owner(log, flags)
    try:
        yield owner
    finally:
        _stop(owner.process, log)


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) in (0, -signal.SIGTERM), log.read_text()[-3000:]


def _ready(url: str, verify: ssl.SSLContext | bool) -> bool:
    try:
        return httpx.get(f"{url}/readyz", verify=verify).is_success
    except httpx.TransportError:
        return False


def client_command(url: str | None, verb: str, *arguments: Any) -> list[str]:
    """The command line of a `pema-client` verb, with what it needs to pass the guard in its environment."""
    server_arguments = ["--server", url] if url else []
    shown = guard.current.client_environment.items() if guard.current else ()
    environment = ["env", *(f"{name}={value}" for name, value in shown)]
    return [*environment, sys.executable, "-m", "data_owner_client.cli", verb, *server_arguments, *map(str, arguments)]


def client(url: str | None, verb: str, *arguments: Any, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a `pema-client` verb to its end."""
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb"}
    command = client_command(url, verb, *arguments)
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, check=False)


def client_json(url: str | None, verb: str, *arguments: Any, stdin: str | None = None) -> Any:
    """The JSON that a verb prints."""
    done = client(url, verb, "--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def end(process: subprocess.Popen[str], *, within_s: float = 120) -> int:
    """The exit status of a client that was left to itself: 0, or 1 with one clear line."""
    _, errors = process.communicate(timeout=within_s)
    assert process.returncode in (0, 1), errors[-3000:]
    assert "Traceback" not in errors
    if process.returncode == 1:
        line = errors.strip().splitlines()[-1]
        assert line.startswith("pema-client: "), errors[-3000:]
        assert len(line) < 400
        print(line)
    return process.returncode
