"""A real server stops: by a signal, and by a broken or hanging engine."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from harness.processes import free_port
from harness.tiny_models import TinyModels
from protocol.codec import JSON
from protocol.errors import NotReady, from_problem
from protocol.messages import EncodeRequest
from tests import guard, support
from tests.processes.ailing_server import BREAK, FAIL, HANG, HELD, HOLD, LOADING
from tests.processes.parties import start_server, wait_until_ready

until = partial(support.until, within_s=120)
_STATUS = health_pb2.HealthCheckResponse


class Ailing:
    """A server of `ailing_server.py`, asked over both transports."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        self.log, self.held = folder / "log", folder / "held"
        self.http, self.grpc = free_port(), free_port()
        self.url, self.grpc_url = guard.url("http", self.http), guard.url("grpc", self.grpc)
        ports = self.http, self.grpc
        self.process = start_server(
            self.log, *ports, "--model", str(model), *flags, module="tests.processes.ailing_server"
        )
        wait_until_ready(self.process, self.url, self.log)
        self.pool = ThreadPoolExecutor(4)

    def post(self, first: int) -> httpx.Response:
        body = EncodeRequest(token_ids=[[first, 5, 6]], from_position=[0]).to_json()
        with guard.http(self.url, timeout=120) as http:
            return http.post("/v1/encode", content=body, headers={"Content-Type": JSON})

    def probe(self, name: str) -> int:
        """Status of a probe over HTTP."""
        return httpx.get(f"{self.url}/{name}", verify=guard.trust()).status_code

    def hold(self, first: int = HOLD) -> Future[httpx.Response]:
        """A call that the engine works on until `held` is gone, or for ever."""
        response = self.pool.submit(self.post, first)
        until(self.held.exists)
        return response

    def ready(self) -> tuple[int, int]:
        """Statuses of the probes of both transports."""
        with guard.channel(self.grpc_url) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return self.probe("readyz"), stub.Check(health_pb2.HealthCheckRequest()).status

    def end(self) -> int:
        return self.process.wait(timeout=120)


@pytest.fixture
def ailing(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ailing]]:
    servers: list[Ailing] = []
    monkeypatch.setenv(HELD, str(tmp_path / "held"))

    def start(*flags: str) -> Ailing:
        servers.append(Ailing(tiny_models["llama"], tmp_path, *flags))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        server.pool.shutdown()


def refused(response: httpx.Response) -> NotReady:
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) > 0
    error = from_problem(response.json(), response.status_code)
    assert isinstance(error, NotReady)
    return error


def test_a_broken_engine_ends_the_server(ailing: Callable[..., Ailing]) -> None:
    server = ailing()
    refused(server.post(BREAK))
    assert server.end() == 1
    log = server.log.read_text()
    assert "the engine is broken" in log
    assert "no luck" not in log
    assert "Traceback" not in log
    last = log.rstrip().splitlines()[-1]
    assert last.startswith("pema-server: The engine has failed its check after an error. Start the server again.")


def test_sigterm_lets_calls_end(ailing: Callable[..., Ailing]) -> None:
    server = ailing()
    until(lambda: server.ready() == (200, _STATUS.SERVING))
    assert server.post(FAIL).status_code == 500
    # Over gRPC, too, as the stream of a client that stays.
    connection = guard.connection(server.grpc_url, retry_for=0)
    fine = EncodeRequest(token_ids=[[7, 5, 6]], from_position=[0])
    connection.encode(fine)

    held = server.hold()
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.ready() == (503, _STATUS.NOT_SERVING))
    assert server.probe("healthz") == 200
    answer = server.post(7)
    assert "stopping" in str(refused(answer))
    assert answer.headers["connection"] == "close"  # a balancer of connections gives the next one to another server
    with pytest.raises(NotReady, match="stopping"):
        connection.encode(fine)
    assert server.process.poll() is None
    server.held.unlink()
    response = held.result(120)
    assert response.status_code == 200
    assert len(response.content) > 100
    assert server.end() == 0
    connection.close()
    log = server.log.read_text()
    assert "no luck" not in log
    assert "uncaught" not in log
    assert log.rstrip().splitlines()[-1].endswith(f"Finished server process [{server.process.pid}]")


def test_what_does_not_end_in_time_is_refused(ailing: Callable[..., Ailing]) -> None:
    metrics = free_port()
    server = ailing("--drain-timeout", "0.5", "--metrics-port", str(metrics))
    held, waiting = server.hold(), server.pool.submit(server.post, 7)
    queued = 'pema_queue_requests{state="waiting"} 1.0'
    until(lambda: queued in httpx.get(f"http://127.0.0.1:{metrics}/metrics").text)
    with (
        socket.create_connection(("127.0.0.1", server.http), timeout=120) as bare,
        guard.encrypted(bare) as sending,
    ):
        key = [f"{name}: {value}" for name, value in guard.headers().items()]
        fields = ["Host: localhost", *key, "Content-Length: 9", "Expect: 100-continue"]
        head = ["POST /v1/encode HTTP/1.1", *fields, "", ""]
        sending.sendall("\r\n".join(head).encode())
        assert sending.recv(1000).startswith(b"HTTP/1.1 100 ")  # so its body is being waited for
        server.process.send_signal(signal.SIGINT)
        for response in (held, waiting):
            assert "stopping" in str(refused(response.result(120)))
        assert server.end() == 0
        last = sending.makefile("rb").read()
    assert last.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in last.lower()
    log = server.log.read_text()
    assert "3 calls have not ended in time" in log
    assert log.count(" POST /v1/encode -> 503 in ") == 3


def test_a_second_signal_stops_at_once(ailing: Callable[..., Ailing]) -> None:
    server = ailing()
    held = server.hold()
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.probe("readyz") == 503)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == -signal.SIGTERM
    with pytest.raises(httpx.TransportError):
        held.result(120)


def test_a_model_that_is_still_loading_keeps_no_server_from_stopping(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, log = tmp_path / "loading", tmp_path / "log"
    monkeypatch.setenv(LOADING, str(loading))
    model = ["--model", str(tiny_models["llama"])]
    process = start_server(log, free_port(), 0, *model, module="tests.processes.ailing_server")
    try:
        until(loading.exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
    assert log.read_text().rstrip().splitlines()[-1].endswith(f"Finished server process [{process.pid}]")


def test_a_hanging_engine_ends_the_server(ailing: Callable[..., Ailing]) -> None:
    server = ailing("--engine-timeout", "1")
    hanging = [server.hold(HANG), server.pool.submit(server.post, 7)]
    for response in hanging:
        assert refused(response.result(120)).retry_after_s
    assert server.end() == 1
    last = server.log.read_text().rstrip().splitlines()[-1]
    assert last.startswith("pema-server: The engine has not come back for 1 s.")
    assert "Traceback" not in server.log.read_text()
