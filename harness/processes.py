"""`pema-server`, `pema-client` and benchmark workers as child processes."""

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx

_READY_WITHIN_SECONDS = 240.0
_STOPPED_WITHIN_SECONDS = 120.0
_LOG_TAIL = 3000


class ServerNotReady(RuntimeError):
    """A server that stopped, or took too long, before it was ready. The message ends with the end of its log."""


class Ports(NamedTuple):
    """Ports of one server on this machine; 0 for a transport that it does not serve."""

    rest: int
    grpc: int


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that no process uses at the moment."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]


def free_port() -> int:
    """A TCP port that no process uses at the moment."""
    return free_ports(1)[0]


def start_server(
    log: Path,
    ports: Ports,
    *flags: str,
    module: str = "plm_owner_server.cli",
    python: str = sys.executable,
    cores: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `pema-server serve`, without waiting until it is ready.

    Args:
        log: file that its output is appended to.
        ports: that it listens on.
        flags: further flags of `serve`; the last one of a name holds.
        module: the module to run; it must have the server's command line.
        python: interpreter of the environment that the server runs in.
        cores: CPU cores that it may use; all by default.
        environment: variables to set beside those of this process.
    """
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores))] if cores else []
    named = ["--port", str(ports.rest), "--grpc-port", str(ports.grpc)]
    command = [*pinned, python, "-m", module, "serve", *named, *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | dict(environment or {})
        )


def wait_until_ready(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    verify: ssl.SSLContext | bool = True,
    *,
    within_seconds: float = _READY_WITHIN_SECONDS,
) -> None:
    """Return once the server at `url` answers that it is ready.

    Raises:
        ServerNotReady: it stopped, or took longer than `within_seconds`.
    """
    deadline = time.monotonic() + within_seconds
    while not _is_ready(url, verify):
        if process.poll() is not None:
            raise ServerNotReady(f"The server stopped. The end of {log}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerNotReady(
                f"The server was not ready after {within_seconds:.0f} s. The end of {log}:\n{_tail(log)}"
            )
        time.sleep(0.1)


def _is_ready(url: str, verify: ssl.SSLContext | bool) -> bool:
    try:
        return httpx.get(f"{url}/readyz", verify=verify, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]


def stop_server(process: subprocess.Popen[bytes], log: Path) -> None:
    """Stop a server with SIGTERM and wait for its end.

    Raises:
        RuntimeError: it had to be killed, or ended with an unexpected status.
    """
    process.terminate()
    try:
        status = process.wait(timeout=_STOPPED_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    if status not in (0, -signal.SIGTERM):
        raise RuntimeError(f"The server ended with status {status}. The end of {log}:\n{_tail(log)}")


@contextmanager
def running_server(
    log: Path, ports: Ports, *flags: str, url: str, verify: ssl.SSLContext | bool = True, **how: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready, and is stopped at the end; `how` are further arguments of `start_server`."""
    process = start_server(log, ports, *flags, **how)
    try:
        wait_until_ready(process, url, log, verify)
        yield process
    finally:
        if process.poll() is None:
            stop_server(process, log)


@contextmanager
def server(log: Path, *flags: str, **how: Any) -> Iterator[Ports]:
    """A server on free ports, once it is ready; `how` are further arguments of `start_server`.

    Its store is beside its log, so that tenants of the user who runs this have no effect. The log starts empty.
    """
    ports = Ports(*free_ports(2))
    log.unlink(missing_ok=True)
    store = ["--store", f"sqlite:///{log.parent / 'owner.db'}"]
    with running_server(log, ports, *store, *flags, url=f"http://127.0.0.1:{ports.rest}", **how):
        yield ports


class RestartableServer:
    """A server that can be killed and comes back on the same ports.

    Args:
        log: file that its output is appended to.
        flags: of `pema-server serve`.
        scheme: `http`, or `https` for a server with a certificate.
        verify: trust of its certificate.

    Attributes:
        ports: that it listens on.
        restarts: number of calls of `restart`.
    """

    def __init__(
        self, log: Path, flags: Sequence[str], *, scheme: str = "http", verify: ssl.SSLContext | bool = True
    ) -> None:
        self._flags = flags
        self._log = log
        self._verify = verify
        self.ports = Ports(*free_ports(2))
        self._url = f"{scheme}://127.0.0.1:{self.ports.rest}"
        self.restarts = 0
        self._restarting = threading.Lock()
        self.start()

    def port(self, scheme: str) -> int:
        """The port of a transport: `http` or `grpc`."""
        return self.ports.grpc if scheme == "grpc" else self.ports.rest

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        self.process = start_server(self._log, self.ports, *self._flags)
        wait_until_ready(self.process, self._url, self._log, self._verify)

    def kill(self) -> None:
        """Kill the server, as a lack of memory would."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Kill the server and start it again."""
        with self._restarting:
            self.kill()
            self.start()
            self.restarts += 1

    def stop(self) -> None:
        """Stop the server in good order."""
        stop_server(self.process, self._log)


def client_command(url: str | None, verb: str, *arguments: Any) -> list[str]:
    """Command line of a `pema-client` verb; without a URL, of one that needs no server."""
    server_arguments = ["--server", url] if url else []
    return [sys.executable, "-m", "data_owner_client.cli", verb, *server_arguments, *map(str, arguments)]


class Worker:
    """A process of a benchmark: it prints `ready`, and a JSON object for each line on its standard input.

    Args:
        module: module that it runs.
        arguments: of the module.
        python: interpreter of the environment that it runs in.
    """

    def __init__(self, module: str, arguments: Sequence[str], python: str = sys.executable) -> None:
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def wait_until_ready(self) -> None:
        """Wait for `ready`; exit if the process ends without it."""
        if self._read() != "ready\n":
            sys.exit("A client did not start.")

    def send(self, line: str) -> None:
        """Write a line to its standard input."""
        print(line, file=self._process.stdin, flush=True)

    def record(self) -> dict[str, Any]:
        """The next JSON object that it prints."""
        record: dict[str, Any] = json.loads(self._read())
        return record

    def _read(self) -> str:
        return next(iter(self._process.stdout or ()), "")


def run_together(module: str, arguments: Sequence[Sequence[str]], python: str = sys.executable) -> list[dict[str, Any]]:
    """Run workers that start at the same moment, and return the JSON object that each prints.

    Args:
        module: of the workers.
        arguments: of each worker.
        python: interpreter of the environment that they run in.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(module, words, python)) for words in arguments]
        for worker in workers:
            worker.wait_until_ready()
        for worker in workers:
            worker.send("go")
        return [worker.record() for worker in workers]
