"""Spans of calls, against what was asked."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from plm_owner_server.operations.call_log import CallRecord, CallRecorder
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.operations.tracing import Traces, traces_from_environment
from plm_owner_server.service.plm_service import PlmService
from protocol import pema_pb2, pema_pb2_grpc
from protocol.codec import JSON
from protocol.errors import PemaError
from tests import support

pytestmark = pytest.mark.unguarded("servers of its own, without tenants")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Watched:
    """A state whose spans are kept."""

    def __init__(self, service: PlmService) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.state = ServingState(service)
        self.state.recorder.observers.append(Traces(provider).observe)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()


def test_a_span_of_each_call_over_rest(tiny_service: PlmService) -> None:
    watched = Watched(tiny_service)
    headers = {"Content-Type": JSON, "X-Request-Id": "GEHEIM", "X-Pema-Client": "GEHEIM", "tracestate": "a=GEHEIM"}
    with support.serve_state(watched.state) as url, httpx.Client(base_url=url, headers=headers) as client:
        body = b'{"token_ids": [[5, 6, 7]], "from_position": [1]}'
        client.post("/v1/encode", content=body, headers={"traceparent": TRACEPARENT}).raise_for_status()
        client.post("/v1/encode", content=b"GEHEIM", headers={"traceparent": "GEHEIM"})
        client.get("/readyz")
        client.get("/GEHEIM")
    fine, malformed, other = watched.spans
    assert (fine.name, fine.kind) == ("encode", SpanKind.SERVER)
    assert f"{fine.context.trace_id:032x}" == TRACE
    assert fine.parent is not None
    assert f"{fine.parent.span_id:016x}" == PARENT
    attributes = dict(fine.attributes or {})
    assert attributes.pop("pema.queue_s") >= 0  # type: ignore[operator]
    compute_s = attributes.pop("pema.compute_s")
    assert isinstance(compute_s, float)
    assert fine.start_time is not None
    assert fine.end_time is not None
    assert 0 < compute_s <= (fine.end_time - fine.start_time) / 1e9
    assert attributes == {
        "pema.call": "encode",
        "pema.transport": "rest",
        "pema.outcome": "ok",
        "pema.tokens_in": 3,
        "pema.rows_out": 2,
    }
    assert fine.status.is_ok or fine.status.is_unset
    assert malformed.parent is None
    assert (malformed.attributes or {})["pema.outcome"] == "malformed-message"
    assert malformed.status.is_unset
    assert other.name == "other"
    assert other.status.is_unset
    assert not any("GEHEIM" in span.to_json() for span in watched.spans)


def test_a_span_of_each_call_over_grpc(tiny_service: PlmService) -> None:
    watched = Watched(tiny_service)
    with (
        support.serve_state_over_grpc(watched.state) as url,
        grpc.insecure_channel(url.removeprefix("grpc://")) as channel,
    ):
        stub = pema_pb2_grpc.PlmStub(channel)  # type: ignore[no-untyped-call]
        stub.GetModelCard(pema_pb2.GetModelCardRequest(), metadata=(("traceparent", TRACEPARENT),))
        list(stub.GetLmHead(pema_pb2.HeadRequest(stop=2)))
    card, head = watched.spans
    assert f"{card.context.trace_id:032x}" == TRACE
    assert (card.attributes or {})["pema.transport"] == "grpc"
    assert (head.name, (head.attributes or {})["pema.rows_out"]) == ("head", 2)
    assert head.parent is None


def test_spans_reach_the_collector_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        traces = traces_from_environment()
        assert traces is not None
        recorder = CallRecorder()
        recorder.observers.append(traces.observe)
        with recorder.record(CallRecord("decode", "grpc", "gRPC Decode", "id-1")):
            pass
        traces.close()
        server.shutdown()
        thread.join()
    (resource,) = [spans for request in got for spans in request.resource_spans]
    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert names["service.name"] == "pema-server"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["decode"]
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert traces_from_environment() is None


def test_without_a_collector_nothing_of_it_is_imported() -> None:
    program = """
import sys
import plm_owner_server.cli.server_process
from plm_owner_server.operations.tracing import traces_from_environment

assert traces_from_environment() is None
sys.exit(" ".join(name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(PemaError, match="traces"):
        traces_from_environment()
