"""Two servers on one PostgreSQL: tenants, quotas, usage and secret bases are those of the store, not of a server.

PostgreSQL is that of the machine's packages (`apt-get install postgresql`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import date

import pytest
import torch

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.open import open_connection
from harness.databases import postgres, postgres_programs
from harness.processes import Ports, free_ports, running_server
from harness.tiny_models import TinyModels
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.tenants.usage import read_usage
from protocol.errors import QuotaExceeded, Unauthenticated
from protocol.messages import EncodeRequest
from tests import support

pytest.importorskip("psycopg", reason="pip install -e '.[postgres]'")
pytestmark = [
    pytest.mark.unguarded("tenants of its own"),
    pytest.mark.skipif(postgres_programs() is None, reason="PostgreSQL is not installed"),
]
MASTER_SECRET = "0123456789abcdef" * 4
FIVE_TOKENS = EncodeRequest(token_ids=[[5, 6, 7], [8, 9]], from_position=[0, 0], dtype="float32")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(scope="module")
def store(database: str) -> Iterator[TenantStore]:
    store = TenantStore(database)
    yield store
    store.database.close()


@pytest.fixture(scope="module")
def key(store: TenantStore) -> str:
    return str(store.add("acme"))


@pytest.fixture(scope="module")
def both(
    database: str, key: str, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Connection]]:
    """Clients of one tenant at two servers, the second over gRPC."""
    folder = tmp_path_factory.mktemp("servers")
    flags = ["--model", str(tiny_models["llama"]), "--store", database]
    with ExitStack() as stack:
        clients = []
        for scheme in ("http", "grpc"):
            ports = Ports(*free_ports(2))
            url = {"http": f"http://127.0.0.1:{ports.rest}", "grpc": f"grpc://127.0.0.1:{ports.grpc}"}[scheme]
            server = running_server(
                folder / f"{scheme}.log",
                ports,
                *flags,
                url=f"http://127.0.0.1:{ports.rest}",
                module="tests.processes.impatient_server",  # which knows of changed tenants at once
                environment={"PEMA_MASTER_SECRET": MASTER_SECRET},
            )
            stack.enter_context(server)
            clients.append(stack.enter_context(closing(open_connection(url, api_key=key, retry_for=0))))
        yield clients


def test_both_answer_in_the_same_secret_basis(both: list[Connection]) -> None:
    first, second = (client.encode(FIVE_TOKENS).cr_N_D for client in both)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_tokens_that_one_gave_are_missing_at_the_other(both: list[Connection], store: TenantStore) -> None:
    used = sum(day.tokens for day in read_usage(store.database, since=date.min, tenant="acme"))
    store.set_quotas("acme", {"tokens_per_day": used + 10})
    for client, left in zip(both, (5, 0), strict=True):
        client.encode(FIVE_TOKENS)
        assert {allowance.name: allowance.left for allowance in client.rate_limits}["day"] == left
    for client in both:
        with pytest.raises(QuotaExceeded):
            client.encode(FIVE_TOKENS)
    store.set_quotas("acme", {"tokens_per_day": None})
    assert sum(day.tokens for day in read_usage(store.database, since=date.min, tenant="acme")) == used + 10


def test_calls_at_both_at_once_are_counted_once_each(both: list[Connection], store: TenantStore) -> None:
    def total() -> tuple[int, int]:
        days = list(read_usage(store.database, since=date.min, tenant="acme"))
        return sum(day.requests for day in days), sum(day.tokens for day in days)

    requests, tokens = total()
    store.set_quotas("acme", {"tokens_per_day": tokens + 5 * 30})

    def call(number: int) -> bool:
        try:
            both[number % 2].encode(FIVE_TOKENS)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        answered = list(pool.map(call, range(80)))
    store.set_quotas("acme", {"tokens_per_day": None})
    # What is reserved by calls in progress counts: some may be refused early, and none is answered too many.
    assert 25 <= sum(answered) <= 30
    assert total() == (requests + sum(answered), tokens + 5 * sum(answered))


def test_a_disabled_tenant_is_refused_by_both(both: list[Connection], store: TenantStore) -> None:
    store.disable("acme")
    support.until(lambda: all(map(refused, both)), within_s=30)
    store.enable("acme")
    support.until(lambda: not any(map(refused, both)), within_s=30)


def refused(client: Connection) -> bool:
    try:
        client.encode(FIVE_TOKENS)
    except Unauthenticated:
        return True
    return False
