"""Metadata of a call over both transports: the key, the id, the report of its time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from data_owner_client.plm.connection.base import Attempt, Connection
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.tenants.api_keys import Key
from plm_owner_server.tenants.scopes import SCOPES, Scope
from plm_owner_server.tenants.store import TenantStore
from protocol.errors import Forbidden, InvalidRequest, Unauthenticated
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from tests import guard
from tests.support import serve, serve_over_grpc

CALLS: dict[str, Callable[[Connection], object]] = {
    "model_card": lambda c: c.model_card(),
    "tokenizer": lambda c: c.tokenizer(),
    "lm_head": lambda c: c.lm_head(HeadRequest(start=0, stop=2)),
    "lm_head rows": lambda c: c.lm_head(HeadRequest(token_ids=[1])),
    "encode": lambda c: c.encode(EncodeRequest(token_ids=[[5, 6]], from_position=[0])),
    "decode": lambda c: c.decode(DecodeRequest(token_ids=[[5, 6]], look_ahead=[3])),
    "distribution": lambda c: c.distribution(DistributionRequest(token_ids=[5])),
}
SCOPE_OF: dict[str, Scope] = {name: name for name in SCOPES} | {
    "model_card": "card",
    "tokenizer": "card",
    "lm_head": "head",
    "lm_head rows": "head",
}
SERVERS = {"REST": serve, "gRPC": serve_over_grpc}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_every_call_wants_the_key(
    server: Callable[..., AbstractContextManager[str]], tiny_service: PlmService, tmp_path: Path
) -> None:
    access, good = guard.one_tenant(tmp_path)
    with server(tiny_service, access=access) as url:
        holder, stranger, mistaken = (guard.connection(url, api_key=key) for key in (good, None, good + "s"))
        for call in CALLS.values():
            call(holder)
            for connection, what in ((stranger, "got none"), (mistaken, "got another one")):
                with pytest.raises(Unauthenticated, match=what) as caught:
                    call(connection)
                assert "PEMA_API_KEY" in caught.value.hint
                assert good not in str(caught.value)
        for connection in (holder, stranger, mistaken):
            connection.close()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_a_tenant_may_make_the_calls_of_its_scopes_alone(
    server: Callable[..., AbstractContextManager[str]], tiny_service: PlmService, scope: Scope, tmp_path: Path
) -> None:
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    key = str(store.add("acme", [scope]))
    with server(tiny_service, access=TenantKeyAuthenticator(store)) as url:
        tenant, stranger = guard.connection(url, api_key=key), guard.connection(url, api_key=key[:-1])
        for name, call in CALLS.items():
            if SCOPE_OF[name] == scope:
                call(tenant)
            else:
                with pytest.raises(Forbidden, match=f"needs the scope {SCOPE_OF[name]}") as caught:
                    call(tenant)
                assert f"It allows {scope}." in caught.value.hint
            with pytest.raises(Unauthenticated):
                call(stranger)
        tenant.close()
        stranger.close()


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_calls_belong_to_their_tenant(
    server: Callable[..., AbstractContextManager[str]],
    tiny_service: PlmService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cached states and shares of the model belong to the tenant, under any name of a client."""
    seen: list[CallContext] = []
    for name in ("encode", "decode", "distribution"):
        inner = getattr(PlmService, name)

        def noted(self: PlmService, request: Any, caller: CallContext, inner: Callable[..., Any] = inner) -> Any:
            seen.append(caller)
            return inner(self, request, caller)

        monkeypatch.setattr(PlmService, name, noted)
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    for tenant in ("acme", "beta"):
        store.add(tenant)
    with server(tiny_service, access=TenantKeyAuthenticator(store)) as url:
        for tenant in ("acme", "beta"):
            connection = guard.connection(url, api_key=str(store.rotate_key(tenant)))
            for name in ("encode", "decode", "distribution"):
                CALLS[name](connection)
            connection.close()
    assert [(caller.tenant, caller.client) for caller in seen] == [("acme", "acme")] * 3 + [("beta", "beta")] * 3


def test_probes_need_no_key_and_browsers_are_told_how(tiny_service: PlmService, tmp_path: Path) -> None:
    access, _ = guard.one_tenant(tmp_path)
    with serve(tiny_service, access=access) as url, guard.http(url, headers_of_all={}) as http:
        assert http.get("/healthz").is_success
        assert http.get("/readyz").is_success
        refused = http.get("/v1/model")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_both_sides_log_the_same_id_and_errors_name_it(
    server: Callable[..., AbstractContextManager[str]], tiny_service: PlmService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with server(tiny_service) as url:
        connection = guard.connection(url)
        CALLS["encode"](connection)
        with pytest.raises(InvalidRequest) as caught:
            connection.encode(EncodeRequest(token_ids=[[]], from_position=[0]))
        connection.close()
    ours, theirs = (
        {record.getMessage().split()[0] for record in caplog.records if record.name.startswith(name)}
        for name in ("data_owner_client.plm.connection", "plm_owner_server")
    )
    assert len(ours) == 2
    assert ours <= theirs
    assert caught.value.request_id in ours


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("call", ["encode", "decode"])
def test_the_server_says_where_the_time_went(
    server: Callable[..., AbstractContextManager[str]], tiny_service: PlmService, call: str
) -> None:
    with server(tiny_service) as url:
        connection, seen = guard.connection(url), list[Attempt]()
        connection.observers.append(seen.append)
        CALLS[call](connection)
        connection.close()
    (exchange,) = seen
    timing = exchange.timing
    assert timing is not None
    assert timing.compute_ms > 0
    assert timing.serialise_ms > 0
    assert timing.queue_ms >= 0
    assert timing.total_ms <= 1000 * exchange.seconds


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_keys_that_are_not_good_cannot_be_told_apart(
    server: Callable[..., AbstractContextManager[str]], tiny_service: PlmService, tmp_path: Path
) -> None:
    """Nobody's, another secret with somebody's public part, and that of a disabled tenant: one and the same answer."""
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    good, disabled = str(store.add("acme")), str(store.add("beta"))
    store.disable("beta")
    foreign = good.rpartition("_")[0] + "_" + disabled[-43:]
    told = set()
    with server(tiny_service, access=TenantKeyAuthenticator(store)) as url:
        for key in (str(Key.new()), foreign, disabled):
            connection = guard.connection(url, api_key=key)
            with pytest.raises(Unauthenticated) as caught:
                connection.model_card()
            told.add((caught.value.detail, caught.value.hint, caught.value.retry_after_s))
            connection.close()
    assert len(told) == 1


def test_a_clock_that_jumps_lets_nobody_in_or_out(
    tiny_service: PlmService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over REST: a client of gRPC in this process would lose its own deadlines."""
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    good, disabled = str(store.add("acme")), str(store.add("beta"))
    store.disable("beta")
    with serve(tiny_service, access=TenantKeyAuthenticator(store)) as url:
        holder, stranger = guard.connection(url, api_key=good), guard.connection(url, api_key=disabled)
        now = time.time()
        for moment in (now + 10**9, 0.0, now):
            monkeypatch.setattr(time, "time", lambda moment=moment: moment)
            for _ in range(2):
                assert holder.model_card()
                with pytest.raises(Unauthenticated):
                    stranger.model_card()
        holder.close()
        stranger.close()
