"""Nothing of the user's is kept: what a real server writes, wherever it writes it, is searched for planted secrets.

The server has debug logs, metrics, traces and tenants; it is asked well and badly over both transports, its engine
fails and breaks, it is killed, started again, and crashes.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from harness.processes import free_port
from harness.tiny_models import TinyModels
from protocol import pema_pb2, pema_pb2_grpc
from protocol.codec import BINARY, JSON
from protocol.integrity import token_crc32s
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest
from protocol.protobuf import to_proto
from tests import guard
from tests.processes.ailing_server import BREAK, FAIL, HELD, HOLD
from tests.processes.parties import start_server, wait_until_ready
from tests.processes.test_operations import until
from tests.processes.test_tenants import pema_server

WORD = "Xylophongeheimnis"
TEXT = f"Das {WORD} ist 17."
IDS = [211, 97, 183, 59, 240, 131]
KEY = f"pema_0123456789abcdef_{WORD}"

FOUND = re.compile(WORD.encode() + b"|" + rb"\D{1,4}".join(str(i).encode() for i in IDS[:3]), re.IGNORECASE)
"""The text, and three of the ids in a row however they are divided."""


class Collector:
    """Takes spans, as bytes."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()


def encode(*ids: int) -> EncodeRequest:
    return EncodeRequest(token_ids=[list(ids)], from_position=[0], echo=token_crc32s([ids]))


def ask_over_rest(url: str, key: str) -> list[httpx.Response]:
    """Good calls and bad ones; the answers to all."""
    headers = {"Authorization": f"Bearer {key}", "X-Pema-Client": WORD, "User-Agent": WORD, "Cookie": f"a={WORD}"}
    headers |= {"tracestate": f"a={WORD}", "Content-Type": JSON}
    with guard.http(url, headers_of_all=headers, timeout=120) as client:

        def post(call: str, body: bytes, **more: str) -> httpx.Response:
            return client.post(f"/v1/{call}", content=body, headers={k.replace("_", "-"): v for k, v in more.items()})

        def json_of(**fields: Any) -> bytes:
            return json.dumps(fields).encode()

        good = [
            post("next-token-distribution", json_of(text=TEXT, top_k=1)),
            post("next-token-distribution", json_of(text=TEXT, template="chat", top_k=1)),
            post("encode", encode(*IDS).to_bytes(), Content_Type=BINARY),
            post("decode", DecodeRequest(token_ids=[IDS], look_ahead=[3]).to_json()),
        ]
        assert [response.status_code for response in good] == [200] * len(good)
        return [
            post("encode", encode(FAIL, *IDS).to_json()),
            post("next-token-distribution", TEXT.encode()),
            post("next-token-distribution", json_of(text=[TEXT])),
            post("next-token-distribution", json_of(text=TEXT, template=WORD * 2)),
            post("next-token-distribution", json_of(text=TEXT, top_k=TEXT)),
            post("next-token-distribution", json_of(**{TEXT: 1})),
            post("next-token-distribution", json_of(text=TEXT), Content_Type=WORD),
            post("next-token-distribution", json_of(text=TEXT), Accept=WORD),
            post("next-token-distribution", json_of(text=TEXT), Authorization=f"Bearer {WORD}"),
            post("next-token-distribution", json_of(text=TEXT), Authorization=f"Bearer {KEY}"),
            post("next-token-distribution", json_of(text=TEXT), traceparent=WORD, X_Request_Id=f"{WORD}\tx"),
            post("encode", json_of(token_ids=[IDS], from_position=[99])),
            post("encode", json_of(token_ids=[[*IDS, 2**31 - 1]], from_position=[0])),
            post("encode", json_of(token_ids=[IDS], from_position=[0], echo=IDS)),
            post("encode", json_of(token_ids=[[*IDS, WORD]], from_position=[0])),
            post("encode", encode(*IDS).to_bytes()[:-9], Content_Type=BINARY),
            post("lm-head", json_of(token_ids=[*IDS, -1])),
            client.get(f"/v1/{WORD}"),
            client.get("/v1/lm-head", params={"start": TEXT, WORD: WORD}),
            client.request(WORD, "/v1/model"),
        ]


def ask_over_grpc(address: str, key: str) -> list[str]:
    """Good calls and bad ones; what is told of the bad ones."""
    told: list[str] = []
    metadata = (("authorization", f"Bearer {key}"), ("x-pema-client", WORD), ("tracestate", f"a={WORD}"))
    with guard.channel(address, with_key=False) as channel:
        stub = pema_pb2_grpc.PlmStub(channel)  # type: ignore[no-untyped-call]

        def attempt(call: Any, request: Any, metadata: Sequence[tuple[str, str]] = metadata) -> None:
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata, timeout=120)
            told.append(f"{caught.value.details()} {caught.value.trailing_metadata()}")

        text = to_proto(DistributionRequest(text=TEXT, top_k=1), pema_pb2.DistributionRequest())
        stub.GetNextTokenDistribution(text, metadata=metadata, timeout=120)
        attempt(stub.GetNextTokenDistribution, text, [("authorization", f"Bearer {KEY}")])
        text.template = WORD
        attempt(stub.GetNextTokenDistribution, text)
        raw: Any = channel.unary_unary("/pema.v1.Plm/GetNextTokenDistribution")
        attempt(raw, TEXT.encode())
        attempt(channel.unary_unary(f"/pema.v1.Plm/{WORD}"), b"")

        def calls() -> Iterator[Any]:
            for ids, echo in ((IDS, None), ([FAIL, *IDS], None), (IDS, IDS)):
                request = EncodeRequest(token_ids=[ids], from_position=[0], echo=echo)
                yield pema_pb2.EncodeCall(request_id="1", request=to_proto(request, pema_pb2.EncodeRequest()))

        pieces = list(stub.Encode(calls(), metadata=metadata, timeout=120))
        assert len(pieces) == 3
        told += [str(piece.problem) for piece in pieces if piece.HasField("problem")]
        assert len(told) == 6
    return told


def shout(port: int) -> bytes:
    """The answer of a port to bytes of no protocol."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{TEXT}\r\n{IDS}\r\n\r\n".encode())
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


def test_nothing_of_the_users_is_written_anywhere(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, held, store = tmp_path / "log", tmp_path / "held", tmp_path / "owner.db"
    database = f"sqlite:///{store}"
    key = pema_server(database, "tenants", "add", "acme").stdout.strip()
    port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    url = guard.url("http", port)
    flags = ["--model", str(tiny_models["llama"]), "--store", database, "--metrics-port", str(metrics_port)]
    flags += ["--log-level", "debug", "--log-format", "json"]
    written: dict[str, bytes] = {}
    with collector() as spans, ThreadPoolExecutor(2) as pool:
        monkeypatch.setenv(HELD, str(held))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", spans.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        # As an owner may have it, for other services: FastAPI would tell the collector of paths and queries.
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")

        def post(first: int) -> httpx.Response:
            body, headers = encode(first, *IDS).to_json(), {"Authorization": f"Bearer {key}", "Content-Type": JSON}
            with guard.http(url, headers_of_all=headers, timeout=120) as http:
                return http.post("/v1/encode", content=body)

        for life, last in enumerate((signal.SIGKILL, signal.SIGABRT)):
            process = start_server(log, port, grpc_port, *flags, module="tests.processes.ailing_server")
            try:
                wait_until_ready(process, url, log)
                bad = ask_over_rest(url, key)
                # A trace and an id that are none are no mistakes.
                assert sorted(r.status_code for r in bad)[:2] == [200, 400], [r.status_code for r in bad]
                written[f"REST {life}"] = b"\n".join(r.content + str(r.headers).encode() for r in bad)
                written[f"gRPC {life}"] = "\n".join(ask_over_grpc(guard.url("grpc", grpc_port), key)).encode()
                written[f"junk {life}"] = shout(port) + shout(grpc_port)
                written[f"metrics {life}"] = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").content
                # The last of them is sent before the end.
                until(lambda: b"head" in b"".join(spans.bodies))
                broken = post(BREAK)
                assert broken.status_code == 503
                written[f"broken {life}"] = broken.content
                assert process.wait(120) == 1
                process = start_server(log, port, grpc_port, *flags, module="tests.processes.ailing_server")
                wait_until_ready(process, url, log)
                running = pool.submit(post, HOLD)
                until(held.exists)
                written[f"metrics {life}, held"] = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").content
            finally:
                process.send_signal(last)
                assert process.wait(120) == -last
            assert isinstance(running.exception(120), httpx.TransportError)
            held.unlink()
    written |= {"log": log.read_bytes(), "spans": b"\n".join(spans.bodies)}
    written |= {path.name: path.read_bytes() for path in tmp_path.glob("owner.db*")}
    assert not list(tmp_path.glob("core*"))

    # That there was something to search.
    assert FOUND.search(f"{IDS}".encode())
    assert FOUND.search(TEXT.lower().encode())
    assert written["log"].count(b'"call": "encode"') > 10
    assert b'"level": "DEBUG"' in written["log"]
    assert b"RuntimeError" in written["log"]
    assert b"Fatal Python error: Aborted" in written["log"]
    assert b'pema_requests_total{call="distribution"' in written["metrics 1"]
    assert b"pema.outcome" in written["spans"]
    assert b"acme" in written["owner.db"]

    secret = key.rpartition("_")[2].encode()
    for where, what in written.items():
        found = FOUND.search(what) or re.search(re.escape(secret), what)
        assert not found, f"{where}: {what[max(0, found.start() - 200) : found.end() + 50]!r}"
