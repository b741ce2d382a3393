"""What goes with a call besides its answer, over both transports: the key, the id, the account of its time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import pytest

from data_owner_client.connection import Connection, Exchange, open_connection
from plm_owner_server.service import PlmService
from protocol.errors import InvalidRequest, Unauthenticated
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from tests.support import serve, serve_over_grpc

KEY = "a key of the owner"
CALLS: dict[str, Callable[[Connection], object]] = {
    "model_card": lambda c: c.model_card(),
    "tokenizer": lambda c: c.tokenizer(),
    "lm_head": lambda c: c.lm_head(HeadRequest(start=0, stop=2)),
    "lm_head rows": lambda c: c.lm_head(HeadRequest(token_ids=[1])),
    "encode": lambda c: c.encode(EncodeRequest(token_ids=[[5, 6]], from_position=[0])),
    "decode": lambda c: c.decode(DecodeRequest(token_ids=[[5, 6]], look_ahead=[3])),
    "distribution": lambda c: c.distribution(DistributionRequest(token_ids=[5])),
}
SERVERS = {"REST": serve, "gRPC": serve_over_grpc}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_every_call_wants_the_key(server: Callable[..., AbstractContextManager[str]], tiny_service: PlmService) -> None:
    with server(tiny_service, api_key=KEY) as url:
        holder, stranger, mistaken = (open_connection(url, api_key=key) for key in (KEY, None, KEY + "s"))
        for call in CALLS.values():
            call(holder)
            for connection, what in ((stranger, "got none"), (mistaken, "got another one")):
                with pytest.raises(Unauthenticated, match=what) as caught:
                    call(connection)
                assert "PEMA_API_KEY" in caught.value.hint
                assert KEY not in str(caught.value)
        for connection in (holder, stranger, mistaken):
            connection.close()


def test_probes_need_no_key_and_browsers_are_told_how(tiny_service: PlmService) -> None:
    with serve(tiny_service, api_key=KEY) as url:
        assert httpx.get(f"{url}/healthz").is_success
        assert httpx.get(f"{url}/readyz").is_success
        refused = httpx.get(f"{url}/v1/model")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_both_sides_log_the_same_id_and_errors_name_it(
    server: Callable[..., AbstractContextManager[str]], tiny_service: PlmService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with server(tiny_service) as url:
        connection = open_connection(url)
        CALLS["encode"](connection)
        with pytest.raises(InvalidRequest) as caught:
            connection.encode(EncodeRequest(token_ids=[[]], from_position=[0]))
        connection.close()
    ours, theirs = (
        {record.getMessage().split()[0] for record in caplog.records if record.name.startswith(name)}
        for name in ("data_owner_client.connection", "plm_owner_server")
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
        connection, seen = open_connection(url), list[Exchange]()
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
