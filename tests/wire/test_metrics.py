"""Metrics that Prometheus reads from a server, against the requests that were made."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from data_owner_client.plm.connection.open import open_connection
from harness.tiny_models import TinyModels
from plm_owner_server.admission.allowed_hosts import AllowedHosts
from plm_owner_server.engines.interface import EncodeBatch, Encoded
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.operations.metrics import Metrics
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidRequest, PemaError
from protocol.messages import DecodeRequest, EncodeRequest, HeadRequest
from tests import support

pytestmark = pytest.mark.unguarded("servers of its own, without tenants")

Sample = tuple[str, tuple[tuple[str, str], ...]]


class Blocking:
    """An engine that waits before it encodes."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.info, self.head, self.stats = engine.info, engine.head, engine.stats
        self.warm_up, self.drafting = engine.warm_up, engine.drafting
        self.entered, self.go = threading.Event(), threading.Event()

    def encode(self, batch: EncodeBatch) -> Encoded:
        self.entered.set()
        assert self.go.wait(60)
        return self.engine.encode(batch)


class Watched:
    """A service with metrics that are read over HTTP."""

    def __init__(self, service: PlmService | None) -> None:
        self.state = ServingState(service)
        self.metrics = Metrics(self.state)
        self.state.recorder.observers.append(self.metrics.observe)

    def text(self) -> str:
        with self.metrics.served("127.0.0.1", 0, check_host=AllowedHosts().check) as port:
            return httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text

    def read(self) -> dict[Sample, float]:
        families = text_string_to_metric_families(self.text())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def key(name: str, **labels: str) -> Sample:
    return name, tuple(sorted(labels.items()))


@pytest.fixture
def watched(tiny_models: TinyModels) -> Watched:
    return Watched(support.make_service(tiny_models["llama"]))


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_what_is_counted_is_what_was_asked(watched: Watched, transport: str) -> None:
    serve = support.serve_state if transport == "rest" else support.serve_state_over_grpc
    before = watched.read()
    with serve(watched.state) as url:
        connection = open_connection(url)
        sequences = support.random_ids(3, [7, 12, 40], shared=5)
        connection.encode(EncodeRequest(token_ids=sequences, from_position=[1, 2, 3]))
        connection.decode(DecodeRequest(token_ids=[[5, 6, 7]], look_ahead=[4]))
        connection.lm_head(HeadRequest(token_ids=[4, 5]))
        with pytest.raises(InvalidRequest):
            connection.encode(EncodeRequest(token_ids=[[]], from_position=[0]))
        connection.close()
    now = watched.read()
    spent = {name: value - before.get(name, 0) for name, value in now.items() if name[0].startswith("pema_")}
    calls = {name[1]: int(value) for name, value in spent.items() if name[0] == "pema_requests_total"}
    labels = {"transport": transport, "outcome": "ok"}
    assert calls == {
        key("", call="encode", **labels)[1]: 1,
        key("", call="decode", **labels)[1]: 1,
        key("", call="head", **labels)[1]: 1,
        key("", call="encode", transport=transport, outcome="invalid-request")[1]: 1,
    }
    assert spent[key("pema_tokens_in_total", call="encode")] == 7 + 12 + 40
    assert spent[key("pema_rows_out_total", call="encode")] == 6 + 10 + 37
    assert spent[key("pema_tokens_in_total", call="decode")] == 3
    assert spent[key("pema_rows_out_total", call="decode")] == 5
    assert spent[key("pema_rows_out_total", call="head")] == 2
    for part in ("queue", "compute", "serialise"):
        assert spent[key("pema_call_seconds_count", call="decode", part=part)] == 1
    assert spent[key("pema_call_seconds_sum", call="decode", part="compute")] > 0
    # Without anything known, each token was run once, and each drafted one but the last in a step of its own.
    assert spent[key("pema_pass_tokens_total", kind="encode")] == 7 + 12 + 40
    assert spent[key("pema_pass_padded_tokens_total", kind="encode")] == 3 * 40
    assert spent[key("pema_passes_total", kind="encode")] == 1
    assert spent[key("pema_pass_tokens_total", kind="prompt")] == 3
    assert spent[key("pema_passes_total", kind="step")] == 4
    assert now[key("process_resident_memory_bytes")] > 2**20


def test_what_is_known_is_a_hit(watched: Watched) -> None:
    service = watched.state.service
    assert service is not None
    service.decode(DecodeRequest(token_ids=[list(range(5, 45))], look_ahead=[0]))
    first = watched.read()
    assert first[key("pema_prefix_cache_hit_tokens_total")] == 0
    assert first[key("pema_prefix_cache_bytes")] > 0
    service.decode(DecodeRequest(token_ids=[list(range(5, 50))], look_ahead=[0]))
    second = watched.read()
    assert second[key("pema_prefix_cache_hit_tokens_total")] == 40
    assert second[key("pema_pass_tokens_total", kind="prompt")] == 45


def test_without_a_prefix_cache_nothing_is_kept(tiny_models: TinyModels) -> None:
    watched = Watched(service := support.make_service(tiny_models["llama"], prefix_cache_mib=0))
    for _ in range(2):
        service.decode(DecodeRequest(token_ids=[list(range(5, 45))], look_ahead=[2]))
    now = watched.read()
    assert now[key("pema_prefix_cache_bytes")] == 0
    assert now[key("pema_prefix_cache_hit_tokens_total")] == 0


def test_what_nobody_uses_is_forgotten_though_nobody_calls(tiny_models: TinyModels) -> None:
    watched = Watched(service := support.make_service(tiny_models["llama"], prefix_cache_ttl=0.001))
    service.decode(DecodeRequest(token_ids=[list(range(5, 45))], look_ahead=[2]))
    deadline = time.monotonic() + 30
    while watched.read()[key("pema_prefix_cache_bytes")] > 0:
        assert time.monotonic() < deadline
        service.engine.evict_idle()


def test_the_queue_is_seen(tiny_models: TinyModels) -> None:
    service = support.make_service(tiny_models["llama"], wrap=Blocking)
    watched, engine = Watched(service), service.engine
    assert isinstance(engine, Blocking)
    with ThreadPoolExecutor(3) as pool:
        try:
            asked = [pool.submit(service.encode, EncodeRequest(token_ids=[[7] * 9], from_position=[0]))]
            assert engine.entered.wait(60)
            asked += [
                pool.submit(service.encode, EncodeRequest(token_ids=[[7] * n], from_position=[0])) for n in (2, 3)
            ]
            deadline = time.monotonic() + 30
            while watched.read()[key("pema_queue_requests", state="waiting")] < 2:
                assert time.monotonic() < deadline
            now = watched.read()
        finally:
            engine.go.set()
        for future in asked:
            future.result(60)
    assert now[key("pema_queue_requests", state="waiting")] == 2
    assert now[key("pema_queue_tokens", state="waiting")] == 5
    assert now[key("pema_queue_requests", state="running")] == 1
    assert now[key("pema_queue_tokens", state="running")] == 9
    after = watched.read()
    assert not any(value for (name, _), value in after.items() if name.startswith("pema_queue"))


def test_strangers_make_no_labels(watched: Watched) -> None:
    with support.serve_state(watched.state) as url, httpx.Client(base_url=url) as client:
        for number in range(20):
            client.get(f"/GEHEIM/{number}", headers={"X-Pema-Client": f"GEHEIM {number}", "X-Request-Id": f"r{number}"})
            client.request(f"GEHEIM{number}", "/v1/model")
        client.get("/readyz")
    text = watched.text()
    assert "GEHEIM" not in text
    assert 'pema_requests_total{call="other",outcome="invalid-request",transport="rest"} 20.0' in text
    assert len([line for line in text.splitlines() if line.startswith("pema_requests_total")]) == 2


def test_before_the_model_is_loaded_there_are_metrics() -> None:
    now = Watched(None).read()
    assert now[key("pema_ready")] == 0
    assert key("process_resident_memory_bytes") in now


def test_a_port_that_is_taken_is_said() -> None:
    first, second = Watched(None), Watched(None)
    with (
        first.metrics.served("127.0.0.1", 0, check_host=AllowedHosts().check) as port,
        pytest.raises(PemaError, match="--metrics-port"),
        second.metrics.served("127.0.0.1", port, check_host=AllowedHosts().check),
    ):
        pass
