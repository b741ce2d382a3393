"""Features of HTTP alone: forms, headers, probes, limits on bodies, failures, the log, OpenAPI."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from harness.tiny_models import TinyModels
from plm_owner_server.engines.interface import EncodeBatch, Encoded
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.service.plm_service import PlmService
from protocol import errors
from protocol.codec import BINARY, JSON, Message
from protocol.errors import PROBLEM_JSON, Overloaded, from_problem
from protocol.integrity import token_crc32s
from protocol.messages import (
    DecodeRequest,
    DecodeResponse,
    DistributionRequest,
    DistributionResponse,
    EncodeRequest,
    EncodeResponse,
    HeadRequest,
    HeadRows,
    ModelCard,
    TokenizerBundle,
)
from tests import guard
from tests.support import make_service, serve, serve_over_grpc, until
from tests.wire.test_service import A_RANGE, CALLS, checked_problem

FINE = EncodeRequest(token_ids=[[5, 6]], from_position=[0])
AS_JSON = {"Content-Type": JSON}
SECRET = "GEHEIM"


@pytest.fixture(scope="module")
def http(tiny_server: str) -> Iterator[httpx.Client]:
    with guard.http(tiny_server) as client:
        yield client


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/octet-stream", "multipart/form-data"])
def test_an_unknown_content_type_is_refused(http: httpx.Client, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    error = checked_problem(http.post("/v1/encode", content=FINE.to_json(), headers=headers))
    assert type(error) is errors.MalformedMessage
    assert BINARY in error.hint
    assert JSON in error.hint


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("content_type", [BINARY, JSON])
@pytest.mark.parametrize("body", [b"", b"\0" * 100, b"{", FINE.to_bytes()[:40], b"\xff" * 9, b"[1]"])
def test_a_malformed_body_is_refused(http: httpx.Client, path: str, content_type: str, body: bytes) -> None:
    error = checked_problem(http.post(path, content=body, headers={"Content-Type": content_type}))
    assert isinstance(error, errors.InvalidRequest)
    assert error.http_status == 400


def test_a_body_of_the_other_form_is_refused(http: httpx.Client) -> None:
    for body, content_type in ((FINE.to_json(), BINARY), (FINE.to_bytes(), JSON)):
        error = checked_problem(http.post("/v1/encode", content=body, headers={"Content-Type": content_type}))
        assert type(error) is errors.MalformedMessage


def test_parameters_and_case_of_the_content_type_do_not_matter(http: httpx.Client) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert http.post("/v1/encode", content=FINE.to_json(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, BINARY),
        ("*/*", BINARY),
        ("application/*", BINARY),
        (BINARY, BINARY),
        (JSON, JSON),
        ("Application/JSON; q=0.9", JSON),
        ("text/html, */*;q=0.8", BINARY),
    ],
)
def test_the_answer_has_the_form_that_accept_asks_for(http: httpx.Client, accept: str | None, form: str) -> None:
    request = http.build_request("POST", "/v1/encode", content=FINE.to_json(), headers=AS_JSON)
    del request.headers["accept"]
    if accept:
        request.headers["accept"] = accept
    response = http.send(request)
    assert response.headers["content-type"] == form
    answer = EncodeResponse.from_json(response.content) if form == JSON else EncodeResponse.from_bytes(response.content)
    assert answer.rows_B.tolist() == [2]


def test_an_unacceptable_accept_is_406(http: httpx.Client) -> None:
    for path in CALLS:
        response = http.post(path, content=FINE.to_json(), headers=AS_JSON | {"Accept": "text/html"})
        assert type(checked_problem(response)) is errors.NotAcceptable


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/model/", 404), ("GET", "/v1/encode", 405)]
)
def test_unknown_calls_are_problems_too(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == PROBLEM_JSON
    assert response.json()["status"] == status
    assert "/docs" in response.json()["hint"]
    assert response.json()["request_id"] == response.headers["X-Request-Id"]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("content_type", [BINARY, JSON, "text/plain"])
def test_a_body_over_the_limit_is_413(tiny_service: PlmService, chunked: bool, content_type: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    with serve(tiny_service, max_body_bytes=5000) as url, guard.http(url) as client:
        content: Any = pieces() if chunked else b" " * 30_000
        response = client.post("/v1/encode", content=content, headers={"Content-Type": content_type})
        assert ("content-length" in response.request.headers) != chunked
        assert type(checked_problem(response)) is errors.PayloadTooLarge
        assert "5000" in response.json()["detail"]
        body = FINE.to_json()
        padded = body + b" " * (5000 - len(body))
        assert client.post("/v1/encode", content=padded, headers=AS_JSON).status_code == 200
        assert client.post("/v1/encode", content=padded + b" ", headers=AS_JSON).status_code == 413


def test_before_the_model_is_loaded_only_healthz_is_well() -> None:
    with serve(None) as url, guard.http(url) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        responses = [client.get(path) for path in ("/readyz", "/v1/model", "/v1/tokenizer")]
        responses += [client.post(path, content=b"{}", headers=AS_JSON) for path in CALLS]
        for response in responses:
            error = checked_problem(response)
            assert type(error) is errors.NotReady
            assert response.headers["retry-after"] == "2"
            assert error.retry_after_s == 2.0


def test_probes_of_a_ready_server(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready", "model": "llama"}


class _Around:
    """An engine whose `encode` is one's own."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.info, self.head = engine.info, engine.head
        self.warm_up, self.drafting = engine.warm_up, engine.drafting

    def encode(self, batch: EncodeBatch) -> Encoded:
        return self.engine.encode(batch)


class _Blocked(_Around):
    """Stands still in `encode` until it is let go."""

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__(engine)
        self.entered, self.go = threading.Event(), threading.Event()
        self.seen: list[list[list[int]]] = []

    def encode(self, batch: EncodeBatch) -> Encoded:
        self.seen.append(batch.token_ids)
        self.entered.set()
        assert self.go.wait(100)
        return super().encode(batch)


def test_one_request_too_many_is_told_to_come_back(tiny_models: TinyModels) -> None:
    engines: list[_Blocked] = []

    def block(engine: TransformersEngine) -> _Blocked:
        engines.append(_Blocked(engine))
        return engines[0]

    service = make_service(tiny_models["llama"], wrap=block, max_waiting_requests=1)
    engine = engines[0]
    bodies = {
        "/v1/encode": FINE.to_json(),
        "/v1/decode": b'{"token_ids": [[5]], "look_ahead": [0]}',
        "/v1/next-token-distribution": b'{"text": "a"}',
    }
    with serve(service) as url, guard.http(url, timeout=100) as client, ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(client.post, "/v1/encode", content=FINE.to_json(), headers=AS_JSON)
            assert engine.entered.wait(100)
            for path, body in bodies.items():
                response = client.post(path, content=body, headers=AS_JSON)
                error = checked_problem(response)
                assert type(error) is Overloaded
                assert response.status_code == 429
                assert int(response.headers["retry-after"]) >= 1
                assert error.retry_after_s is not None
            with pytest.raises(Overloaded):
                service.encode(FINE, guard.caller())
            with serve_over_grpc(service) as grpc_url:
                connection = guard.connection(grpc_url, retry_for=0)
                calls = (
                    lambda: connection.encode(FINE),
                    lambda: connection.decode(DecodeRequest(token_ids=[[5]], look_ahead=[0])),
                    lambda: connection.distribution(DistributionRequest(text="a")),
                )
                for call in calls:
                    with pytest.raises(Overloaded) as caught:
                        call()
                    assert caught.value.retry_after_s is not None
                connection.close()
            # What needs no forward pass is answered all the same.
            assert client.get("/readyz").status_code == 200
            assert client.post("/v1/lm-head", content=b'{"token_ids": [2]}', headers=AS_JSON).status_code == 200
        finally:
            engine.go.set()
        assert first.result(100).status_code == 200
        for path, body in bodies.items():
            assert client.post(path, content=body, headers=AS_JSON).status_code == 200


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_a_client_that_hangs_up_is_skipped(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    engines: list[_Blocked] = []

    def block(engine: TransformersEngine) -> _Blocked:
        engines.append(_Blocked(engine))
        return engines[0]

    service = make_service(tiny_models["llama"], wrap=block)
    engine = engines[0]
    serving = serve(service) if transport == "rest" else serve_over_grpc(service)
    with serving as url, ThreadPoolExecutor(1) as pool:
        patient, impatient = guard.connection(url), guard.connection(url, timeout=0.5, retry_for=0)
        try:
            first = pool.submit(patient.encode, FINE)
            assert engine.entered.wait(100)
            with pytest.raises(errors.ConnectionFailed):
                impatient.encode(EncodeRequest(token_ids=[[77, 78]], from_position=[0]))
            callers = [request.context for queue in service.scheduler._queues.values() for request in queue]
            until(lambda: any(caller.disconnected.is_set() for caller in callers), within_s=30)
        finally:
            engine.go.set()
        assert len(first.result(100).cr_N_D) == 2
        assert len(patient.encode(FINE).cr_N_D) == 2
        impatient.close()
        patient.close()
    assert engine.seen == [FINE.token_ids, FINE.token_ids]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


class _Failing(_Around):
    """Fails with an error whose text quotes the request."""

    def encode(self, batch: EncodeBatch) -> Encoded:
        raise RuntimeError(f"no luck with {SECRET} {batch.token_ids}")


def test_a_fault_of_the_server_is_500_and_quotes_nothing(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    service = make_service(tiny_models["llama"], wrap=_Failing, max_waiting_requests=1)
    ids = [[201, 202, 203]]
    body = EncodeRequest(token_ids=ids, from_position=[0]).to_json()
    with serve(service) as url, guard.http(url) as client:
        for _ in range(3):  # the place in the queue is given back: no 429
            response = client.post("/v1/encode", content=body, headers=AS_JSON | {"X-Request-Id": "abc-1"})
            error = checked_problem(response)
            assert type(error) is errors.ServerFault
            assert error.request_id == "abc-1"
            assert "GEHEIM" not in response.text
            assert "RuntimeError" not in response.text
        assert client.post("/v1/decode", content=b'{"token_ids":[[5]],"look_ahead":[0]}', headers=AS_JSON).is_success
    assert "GEHEIM" not in caplog.text
    assert "201, 202" not in caplog.text
    # and yet its owner finds out where it was
    assert re.search(r"abc-1.*RuntimeError", caplog.text)
    assert re.search(r"in encode\b", caplog.text)


def test_the_log_has_one_line_per_call_and_no_content(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bodies = [
        ("/v1/next-token-distribution", b'{"text": "GEHEIM"}'),
        ("/v1/next-token-distribution", b'{"text": "GEHEIM", "template": "chat"}'),
        ("/v1/next-token-distribution", b'{"text": ["GEHEIM"]}'),
        ("/v1/next-token-distribution", b'{"text": "GEHEIM", "top_k": "GEHEIM"}'),
        ("/v1/encode", b'{"token_ids": [["GEHEIM"]], "from_position": [0]}'),
        ("/v1/encode", b"GEHEIM"),
        ("/v1/encode", FINE.to_json()),
    ]
    for path, body in bodies:
        http.post(path, content=body, headers=AS_JSON)
    own = [r.getMessage() for r in caplog.records if r.name.startswith("plm_owner_server")]
    cost = r"(: \d+ tokens in, \d+ rows out, queue \d+ ms, compute \d+ ms)?"
    line = re.compile(r"[0-9a-f]{32} POST /v1/[a-z-]+ -> [24]\d\d in \d+ ms" + cost)
    assert all(map(line.fullmatch, own)), own
    assert len(own) == len(bodies)
    assert "GEHEIM" not in caplog.text


@pytest.mark.parametrize("given", ["my-request.7", "x" * 64])
def test_the_clients_request_id_is_echoed(http: httpx.Client, given: str) -> None:
    for request in (
        http.build_request("GET", "/v1/model"),
        http.build_request("POST", "/v1/encode", content=FINE.to_json(), headers=AS_JSON),
        http.build_request("POST", "/v1/encode", content=b"{", headers=AS_JSON),
        http.build_request("GET", "/nowhere"),
    ):
        request.headers["X-Request-Id"] = given
        assert http.send(request).headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a\tb", "é"])
def test_an_unusable_request_id_is_replaced(http: httpx.Client, given: str) -> None:
    response = http.get("/v1/model", headers={b"X-Request-Id": given.encode("latin-1")})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["X-Request-Id"])


def test_request_ids_differ(http: httpx.Client) -> None:
    assert len({http.get("/healthz").headers["X-Request-Id"] for _ in range(5)}) == 5


@pytest.mark.parametrize("path", ["/v1/tokenizer", pytest.param("/v1/lm-head?start=3&stop=9", marks=A_RANGE)])
def test_what_a_client_has_already_is_not_sent_again(http: httpx.Client, path: str) -> None:
    first = http.get(path)
    etag = first.headers["etag"]
    again = http.get(path, headers={"If-None-Match": etag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    other = http.get(path, headers={"If-None-Match": '"another"'})
    assert other.status_code == 200
    assert other.content == first.content


@A_RANGE
def test_the_etag_of_head_rows_tells_what_was_asked_for(http: httpx.Client) -> None:
    asked = ["start=3&stop=9", "start=3&stop=10", "start=2&stop=9", "start=3&stop=9&dtype=float32"]
    tags = [http.get(f"/v1/lm-head?{query}").headers["etag"] for query in asked]
    tags.append(http.get(f"/v1/lm-head?{asked[0]}", headers={"Accept": "application/json"}).headers["etag"])
    assert len(set(tags)) == len(tags)


@A_RANGE
@pytest.mark.parametrize("query", ["start=9&stop=3", "start=-1&stop=3", "stop=1000000", "start=x", "dtype=int4"])
def test_a_bad_range_of_head_rows_is_a_problem(http: httpx.Client, query: str) -> None:
    response = http.get(f"/v1/lm-head?{query}")
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["hint"]


@A_RANGE
def test_a_range_of_head_rows_is_the_same_by_get_and_post(http: httpx.Client) -> None:
    ours = HeadRows.from_bytes(http.get("/v1/lm-head?start=3&stop=9&dtype=float32").content)
    body = HeadRequest(start=3, stop=9, dtype="float32").to_json()
    assert ours.to_bytes() == http.post("/v1/lm-head", content=body, headers=AS_JSON).content


ROUTES: dict[tuple[str, str], tuple[type[Message] | None, type[Message] | None]] = {
    ("get", "/healthz"): (None, None),
    ("get", "/readyz"): (None, None),
    ("get", "/v1/model"): (None, ModelCard),
    ("get", "/v1/tokenizer"): (None, TokenizerBundle),
    ("get", "/v1/lm-head"): (None, HeadRows),
    ("post", "/v1/lm-head"): (HeadRequest, HeadRows),
    ("post", "/v1/encode"): (EncodeRequest, EncodeResponse),
    ("post", "/v1/decode"): (DecodeRequest, DecodeResponse),
    ("post", "/v1/next-token-distribution"): (DistributionRequest, DistributionResponse),
}


def test_openapi_has_a_valid_example_for_every_call(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert {(method, path) for path, methods in document["paths"].items() for method in methods} == set(ROUTES)
    assert "$ref" not in str(document["paths"])
    for (method, path), (request_type, answer_type) in ROUTES.items():
        operation = document["paths"][path][method]
        example = operation["responses"]["200"]["content"][JSON]["example"]
        refusals = {int(status): told for status, told in operation["responses"].items() if int(status) >= 400}
        assert 500 in refusals
        for status, refusal in refusals.items():
            problem = refusal["content"][PROBLEM_JSON]["example"]
            assert from_problem(problem, problem["status"]).http_status == problem["status"] == status
        if answer_type:
            answer: Any = answer_type.model_validate(example)
        if request_type:
            content = operation["requestBody"]["content"]
            request: Any = request_type.model_validate(content[JSON]["example"])
            assert content[BINARY]["schema"]["format"] == "binary"
            assert BINARY in operation["responses"]["200"]["content"]
        if isinstance(request_type, type) and hasattr(answer, "echo"):
            assert answer.echo == token_crc32s(request.token_ids)
            assert int(answer.rows_B.sum()) == len(answer.cr_N_D)
        if isinstance(answer_type, type) and isinstance(answer, EncodeResponse):
            assert (answer.logsumexp_N is not None) == request.with_logsumexp
        if request_type is HeadRequest:
            assert len(answer.weight_N_D) == len(request.token_ids)
    assert http.get("/docs").status_code == 200


def test_simultaneous_calls_do_not_mix(tiny_server: str, tiny_service: PlmService) -> None:
    requests = [EncodeRequest(token_ids=[[5 + i, 7, 9 + i]], from_position=[2], dtype="float32") for i in range(12)]

    def ask(request: EncodeRequest) -> EncodeResponse:
        headers = {"Content-Type": BINARY}
        return EncodeResponse.from_bytes(client.post("/v1/encode", content=request.to_bytes(), headers=headers).content)

    with guard.http(tiny_server) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, requests))
    for request, answer in zip(requests, answers, strict=True):
        alone = tiny_service.encode(request, guard.caller())
        assert answer.echo == alone.echo == token_crc32s(request.token_ids)
        assert (answer.cr_N_D - alone.cr_N_D).abs().max() <= 1e-5
