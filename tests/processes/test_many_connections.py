"""Ten thousand connections that say nothing: the others are answered, and nothing is left behind."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from harness.processes import free_port
from harness.tiny_models import TinyModels
from protocol.messages import EncodeRequest
from tests import guard
from tests.processes.parties import server

WANTED = 10_000
FINE = EncodeRequest(token_ids=[[5, 6]], from_position=[0])


@contextmanager
def as_many_files_as_may_be() -> Iterator[int]:
    """Connections that this process may have to each of two ports."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield min(WANTED, (hard - 500) // 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(port: int) -> socket.socket | None:
    """A connection, if the server takes it."""
    client = socket.socket()
    client.settimeout(30)
    with suppress(OSError):
        client.connect(("127.0.0.1", port))
        return client
    client.close()
    return None


def test_idle_connections_keep_nobody_out(tiny_models: TinyModels, tmp_path: Path) -> None:
    port = free_port()
    flags = ["--model", str(tiny_models["llama"]), "--transfer-timeout", "5"]
    log = tmp_path / "server.log"
    with server(log, *flags, grpc_port=port) as rest, as_many_files_as_may_be() as count, ExitStack() as idle:
        urls = [rest, guard.url("grpc", port)]
        # gRPC closes those over its limit at once.
        for to, most in ((int(rest.rpartition(":")[2]), count), (port, count // 5)):
            for number in range(most):
                if (client := connect(to)) is not None:
                    idle.callback(client.close)
                if number % (most // 3) == 0:
                    for url in urls:
                        connection = guard.connection(url, retry_for=60)
                        assert len(connection.encode(FINE).cr_N_D) == 2
                        connection.close()
        assert httpx.get(f"{rest}/readyz", verify=guard.trust(), timeout=30).is_success
    assert "Traceback" not in log.read_text()
