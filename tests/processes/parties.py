"""The two parties as they really run, behind the guard of `tests.guard` where the tests have one."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness.processes
from harness.processes import Ports, RestartableServer, free_port, running_server
from tests import guard


@contextmanager
def server(
    log: Path,
    *flags: str,
    port: int | None = None,
    grpc_port: int = 0,
    ca: Path | None = None,
    own: tuple[Path, Path] | None = None,
    module: str = "plm_owner_server.cli",
) -> Iterator[str]:
    """`pema-server serve` with these flags, once it is ready; gives its URL for REST.

    With the authority `ca` of its certificate, it is one that speaks TLS; with a certificate of our `own` and its key,
    one that demands it. `module` may be another one with the same command line.
    """
    ports = Ports(port or free_port(), grpc_port)
    url, verify = guard.url("http", ports.rest), guard.trust()
    if ca:
        url, verify = f"https://127.0.0.1:{ports.rest}", ssl.create_default_context(cafile=ca)
        if own:
            verify.load_cert_chain(*own)
    with running_server(log, ports, *_guarded(flags), url=url, verify=verify, module=module):
        yield url


def start_server(
    log: Path, port: int, grpc_port: int, *flags: str, module: str = "plm_owner_server.cli"
) -> subprocess.Popen[bytes]:
    """Start `pema-server serve` on these ports; `module` may be another one with the same command line."""
    return harness.processes.start_server(log, Ports(port, grpc_port), *_guarded(flags), module=module)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return once the server is ready; fail if it stops or takes too long."""
    harness.processes.wait_until_ready(process, url, log, guard.trust())


def _guarded(flags: tuple[str, ...]) -> tuple[str, ...]:
    # Of flags that are given twice, the last one holds.
    return (*guard.current.flags, *flags) if guard.current else flags


class Owner(RestartableServer):
    """The owner's server, which can be killed and comes back on the same ports."""

    def __init__(self, log: Path, *flags: str) -> None:
        scheme = "https" if guard.current else "http"
        super().__init__(log, _guarded(flags), scheme=scheme, verify=guard.trust())

    def url(self, scheme: str) -> str:
        """Address for clients; the scheme is `http` or `grpc`."""
        return guard.url(scheme, self.port(scheme))


@contextmanager
def owner_that_can_be_killed(log: Path, *flags: str) -> Iterator[Owner]:
    """A server that is stopped properly at the end."""
    owner = Owner(log, *flags)
    try:
        yield owner
    finally:
        owner.stop()


def client_command(url: str | None, verb: str, *arguments: Any) -> list[str]:
    """The command line of a `pema-client` verb, with what it needs to pass the guard in its environment."""
    environment = [f"{name}={value}" for name, value in client_environment().items()]
    return ["env", *environment, *harness.processes.client_command(url, verb, *arguments)]


def client_environment() -> Mapping[str, str]:
    """Variables with which `pema-client` passes the guard."""
    return guard.current.client_environment if guard.current else {}


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
    assert "Traceback" not in errors, errors[-3000:]
    if process.returncode == 1:
        line = errors.strip().splitlines()[-1]
        assert line.startswith("pema-client: "), errors[-3000:]
        assert len(line) < 400
        print(line)
    return process.returncode
