"""Quotas over both transports: what calls cost, what every answer tells, who is refused, and until when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from data_owner_client.plm.connection import retries
from data_owner_client.plm.connection.base import Attempt, Connection
from harness.tiny_models import TinyModels
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.admission.ledger import Ledger
from plm_owner_server.engines.interface import EncodeBatch, Encoded
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext, ClientDisconnected
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.tenants.usage import DayOfUsage, read_usage
from protocol import pema_pb2, pema_pb2_grpc
from protocol.errors import BudgetExhausted, InvalidRequest, NumericalFault, QuotaExceeded, ServerFault
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from protocol.protobuf import to_proto
from tests import guard
from tests.support import make_service, serve, serve_over_grpc

SERVERS = {"REST": serve, "gRPC": serve_over_grpc}
Serve = Callable[..., AbstractContextManager[str]]
NOON = datetime(2026, 11, 25, 12, 0, 20, tzinfo=UTC).timestamp()
ENCODE = EncodeRequest(token_ids=[[5, 6, 7], [8, 9]], from_position=[1, 0])  # 5 tokens


@dataclass
class Owner:
    """A ledger with the tenant `acme`.

    Attributes:
        key: of acme's.
        now: what the owner's clock shows.
    """

    store: TenantStore
    key: str
    now: float = NOON

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store.database, lambda: self.now)
        self.access = TenantKeyAuthenticator(self.store, self.ledger)

    def limit(self, **quotas: int | None) -> None:
        self.store.set_quotas("acme", quotas)

    def used(self) -> DayOfUsage:
        (day,) = read_usage(self.store.database, since=date.min)
        return day


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    return Owner(store, str(store.add("acme")))


@pytest.fixture(params=list(SERVERS.values()), ids=list(SERVERS))
def server(request: pytest.FixtureRequest) -> Serve:
    serving: Serve = request.param
    return serving


@pytest.fixture
def url(server: Serve, tiny_service: PlmService, owner: Owner) -> Iterator[str]:
    with server(tiny_service, access=owner.access) as url:
        yield url


@pytest.fixture
def client(url: str, owner: Owner) -> Iterator[Connection]:
    connection = guard.connection(url, api_key=owner.key, retry_for=5)
    yield connection
    connection.close()


def left(connection: Connection) -> dict[str, int]:
    return {allowance.name: allowance.left for allowance in connection.rate_limits}


def test_a_client_can_reckon_what_calls_cost(client: Connection, owner: Owner) -> None:
    client.model_card()
    assert client.rate_limits == ()
    owner.limit(tokens_per_day=10_000, tokens_per_minute=1000, head_rows=100, full_distributions=10)
    tokens = head_rows = full_distributions = 0
    requests = 1

    def expect(*, more: int = 0, rows: int = 0, full: int = 0) -> None:
        nonlocal tokens, head_rows, full_distributions, requests
        tokens, head_rows, full_distributions = tokens + more, head_rows + rows, full_distributions + full
        requests += 1
        assert left(client) == {
            "minute": 1000 - tokens,
            "day": 10_000 - tokens,
            "head-rows": 100 - head_rows,
            "full-distributions": 10 - full_distributions,
        }

    client.model_card()
    expect()
    client.tokenizer()
    expect()
    client.encode(ENCODE)
    expect(more=5)
    answer = client.decode(DecodeRequest(token_ids=[[5, 6, 7], [8, 9]], from_position=[1, 1], look_ahead=[4, 0]))
    drafted = len(answer.cr_N_D) - 2 - 1
    assert 0 < drafted <= 4
    expect(more=5 + drafted)
    # A stop ends the drafting, and what was not drafted is not paid for.
    stops = sorted(set(answer.top1_N.tolist()))
    answer = client.decode(DecodeRequest(token_ids=[[5, 6, 7]], look_ahead=[40], stop_token_ids=stops))
    drafted = len(answer.cr_N_D) - 1
    assert drafted < 40
    expect(more=3 + drafted)
    client.lm_head(HeadRequest(start=10, stop=30))
    expect(rows=20)
    client.lm_head(HeadRequest(token_ids=[29, 30, 30, 31]))
    expect(rows=2)
    client.distribution(DistributionRequest(token_ids=[5, 6], top_k=100))
    expect(more=2)
    client.distribution(DistributionRequest(token_ids=[5, 6], top_k=101))
    expect(more=2, full=1)
    client.distribution(DistributionRequest(token_ids=[5, 6], top_k=0))
    expect(more=2)
    client.distribution(DistributionRequest(token_ids=[5, 7], top_k=0))
    expect(more=2, full=1)
    used = owner.used()
    assert (used.requests, used.refused, used.tokens) == (requests, 0, tokens)
    assert (used.head_rows, used.full_distributions) == (head_rows, full_distributions)


def test_the_refusal_says_when_to_come_back_and_the_client_does(
    client: Connection, url: str, owner: Owner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner.limit(tokens_per_minute=5)
    client.encode(ENCODE)
    # A wait that is longer than the client's patience is told at once.
    other = guard.connection(url, api_key=owner.key, retry_for=5)
    with pytest.raises(QuotaExceeded, match="5 tokens of this minute are used up") as caught:
        other.encode(ENCODE)
    assert left(other) == {"minute": 0}  # a refusal tells it, too
    other.close()
    assert caught.value.retry_after_s == 40
    assert "Come back in 40 s, at 12:01 UTC" in str(caught.value)
    assert caught.value.request_id
    client.model_card()  # costs nothing
    assert left(client) == {"minute": 0}

    def sleep(seconds: float) -> None:
        owner.now += seconds

    monkeypatch.setattr(retries, "sleep_using_event", lambda _: sleep)
    patient, seen = guard.connection(url, api_key=owner.key), list[Attempt]()
    patient.observers.append(seen.append)
    patient.encode(ENCODE)
    patient.close()
    assert [exchange.refused for exchange in seen] == [True, False]
    assert NOON + 40 <= owner.now < NOON + 60
    assert "Come back in 40 s" in caplog.text  # who waits for so long is told
    used = owner.used()
    assert (used.requests, used.refused, used.tokens) == (3, 2, 10)


def test_budgets_for_ever_are_refused_for_ever(client: Connection, owner: Owner) -> None:
    owner.limit(head_rows=3, full_distributions=0)
    client.lm_head(HeadRequest(token_ids=[7, 8]))
    for refused in (
        lambda: client.lm_head(HeadRequest(start=7, stop=11)),
        lambda: client.distribution(DistributionRequest(text="the", top_k=0)),
    ):
        with pytest.raises(BudgetExhausted, match="different") as caught:
            refused()
        assert caught.value.retry_after_s is None
        assert "Ask the owner" in caught.value.hint
    client.lm_head(HeadRequest(start=7, stop=10))
    client.distribution(DistributionRequest(text="the"))
    assert left(client) == {"head-rows": 0, "full-distributions": 0}


def test_nobody_pays_for_no_answer(client: Connection, owner: Owner) -> None:
    owner.limit(tokens_per_day=100, head_rows=10)
    client.model_card()
    for fails, error in (
        (lambda: client.encode(EncodeRequest(token_ids=[[5, 10**6]], from_position=[0])), InvalidRequest),
        (lambda: client.decode(DecodeRequest(token_ids=[[5]], look_ahead=[10**6])), InvalidRequest),
        (lambda: client.lm_head(HeadRequest(start=0, stop=10**6)), InvalidRequest),
        (lambda: client.distribution(DistributionRequest(text="a", token_ids=[1])), InvalidRequest),
    ):
        with pytest.raises(error):
            fails()
        assert left(client) == {"day": 100, "head-rows": 10}
    used = owner.used()
    assert (used.requests, used.refused, used.tokens, used.head_rows) == (1, 0, 0, 0)


class Patched:
    """An engine whose forward pass is another."""

    def __init__(self, engine: TransformersEngine, encode: Callable[[EncodeBatch], Encoded]) -> None:
        self._engine = engine
        self.encode = encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def test_faults_and_numbers_that_do_not_fit_cost_nothing(server: Serve, tiny_models: TinyModels, owner: Owner) -> None:
    owner.limit(tokens_per_day=100)
    engines = list[TransformersEngine]()

    def encode(batch: EncodeBatch) -> Encoded:
        if batch.token_ids[0][0] == 5:
            raise ZeroDivisionError
        encoded = engines[0].encode(batch)
        return replace(encoded, cr_N_D=encoded.cr_N_D * 1e30)

    def patched(engine: TransformersEngine) -> Any:
        engines.append(engine)
        return Patched(engine, encode)

    with server(make_service(tiny_models["llama"], wrap=patched), access=owner.access) as url:
        connection = guard.connection(url, api_key=owner.key)
        for first, error in ((5, ServerFault), (6, NumericalFault)):
            with pytest.raises(error):
                connection.encode(EncodeRequest(token_ids=[[first, 7]], from_position=[0]))
            connection.model_card()
            assert left(connection) == {"day": 100}
        connection.close()


def test_who_has_gone_pays_nothing(tiny_service: PlmService, owner: Owner) -> None:
    owner.limit(tokens_per_day=100)
    caller = CallContext("acme", "acme", meter=owner.ledger.meter("acme"))
    caller.disconnected.set()
    with pytest.raises(ClientDisconnected):
        tiny_service.encode(ENCODE, caller)
    assert [allowance.left for allowance in caller.meter.left] == [100]


def test_places_are_taken_while_calls_are_answered(server: Serve, tiny_models: TinyModels, owner: Owner) -> None:
    owner.limit(concurrent_requests=1)
    engines, begun, go_on = list[TransformersEngine](), threading.Event(), threading.Event()

    def encode(batch: EncodeBatch) -> Encoded:
        begun.set()
        assert go_on.wait(60)
        return engines[0].encode(batch)

    def patched(engine: TransformersEngine) -> Any:
        engines.append(engine)
        return Patched(engine, encode)

    with (
        server(make_service(tiny_models["llama"], wrap=patched), access=owner.access) as url,
        ThreadPoolExecutor(1) as pool,
    ):
        connection = guard.connection(url, api_key=owner.key, retry_for=0)
        answered = pool.submit(connection.encode, ENCODE)
        assert begun.wait(60)
        with pytest.raises(QuotaExceeded, match="1 of your requests") as caught:
            connection.distribution(DistributionRequest(token_ids=[5]))
        assert caught.value.retry_after_s == 1
        go_on.set()
        answered.result(60)
        connection.distribution(DistributionRequest(token_ids=[5]))
        assert left(connection) == {"concurrent": 1}
        connection.close()


def test_rest_tells_it_in_the_fields_of_the_draft(tiny_service: PlmService, owner: Owner) -> None:
    owner.limit(tokens_per_minute=2, full_distributions=0)
    with serve(tiny_service, access=owner.access) as url:
        http = guard.http(url, headers_of_all={"Authorization": f"Bearer {owner.key}"})
        card = http.get("/v1/model")
        assert card.headers["RateLimit"] == '"minute";r=2;t=40, "full-distributions";r=0'
        assert card.headers["RateLimit-Policy"] == (
            '"minute";q=2;w=60;qu="tokens", "full-distributions";q=0;qu="full-distributions"'
        )
        spent = http.post("/v1/next-token-distribution", json={"token_ids": [5, 6], "top_k": 0})
        assert (spent.status_code, "Retry-After" in spent.headers) == (403, False)
        assert http.post("/v1/next-token-distribution", json={"token_ids": [5, 6]}).is_success
        refused = http.post("/v1/next-token-distribution", json={"token_ids": [5, 6]})
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "40")
        assert refused.headers["RateLimit"].startswith('"minute";r=0;t=40')
        assert refused.json()["type"] == "urn:pema:error:quota-exceeded"
        unchanged = http.get("/v1/tokenizer", headers={"If-None-Match": http.get("/v1/tokenizer").headers["ETag"]})
        assert (unchanged.status_code, "RateLimit" in unchanged.headers) == (304, True)
        assert "RateLimit" not in http.get("/readyz").headers
        assert "RateLimit" not in http.get("/v1/model", headers={"Authorization": ""}).headers
        http.close()


def test_grpc_tells_it_in_trailing_metadata_and_with_the_answers_of_a_stream(
    tiny_service: PlmService, owner: Owner
) -> None:
    owner.limit(tokens_per_minute=6)
    metadata = (("authorization", f"Bearer {owner.key}"),)
    request = to_proto(ENCODE, pema_pb2.EncodeRequest())
    with (
        serve_over_grpc(tiny_service, access=owner.access) as url,
        guard.channel(url, with_key=False) as channel,
    ):
        stub = pema_pb2_grpc.PlmStub(channel)  # type: ignore[no-untyped-call]
        _, card = stub.GetModelCard.with_call(pema_pb2.GetModelCardRequest(), metadata=metadata)
        assert dict(card.trailing_metadata()) == {
            "ratelimit": '"minute";r=6;t=40',
            "ratelimit-policy": '"minute";q=6;w=60;qu="tokens"',
        }
        stream = stub.Encode(iter([pema_pb2.EncodeCall(request_id="a", request=request)]), metadata=metadata)
        (piece,) = stream
        assert piece.quotas.rate_limit == '"minute";r=1;t=40'
        assert dict(stream.trailing_metadata())["ratelimit"] == '"minute";r=1;t=40'
        list(stub.Encode(iter([pema_pb2.EncodeCall(request_id="b", request=request)]), metadata=metadata))
        stream = stub.Encode(iter([pema_pb2.EncodeCall(request_id="c", request=request)]), metadata=metadata)
        (piece,) = stream
        assert (piece.problem.status, piece.problem.retry_after_s) == (429, 40)
        assert dict(stream.trailing_metadata())["ratelimit"] == '"minute";r=0;t=40'
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetNextTokenDistribution(pema_pb2.DistributionRequest(text="a"), metadata=metadata)
        refused: Any = caught.value
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.trailing_metadata())["ratelimit"] == '"minute";r=0;t=40'
