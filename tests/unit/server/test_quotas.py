"""Quotas: windows, budgets, what is reserved, and sums that stay exact whoever writes beside one.

With POSTGRES_URL set (postgresql+psycopg://…, to an empty database of its own) the same tests run on PostgreSQL.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, date, datetime
from pathlib import Path
from random import Random

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from plm_owner_server.admission.ledger import Ledger
from plm_owner_server.admission.quota_rules import Instant
from plm_owner_server.cli import main
from plm_owner_server.service.metering import CallCost
from plm_owner_server.tenants import database as database_module
from plm_owner_server.tenants.database import Database
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.tenants.tables import RUNNING, TENANTS
from plm_owner_server.tenants.usage import DayOfUsage, read_usage
from protocol.errors import BudgetExhausted, NotReady, QuotaExceeded
from protocol.rate_limits import RateLimitStatus, from_fields, to_fields
from tests import support

NOON = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC).timestamp()
TODAY = date(2026, 11, 25)
MODEL, OTHER_MODEL = "a" * 64, "b" * 64
V = 1000


class Clock:
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def url(tmp_path: Path) -> str:
    return support.empty_database(tmp_path)


@pytest.fixture
def store(url: str) -> TenantStore:
    return TenantStore(url)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(store: TenantStore, clock: Clock) -> Ledger:
    return Ledger(store.database, clock)


def call(ledger: Ledger, cost: CallCost | int, tenant: str = "acme") -> dict[str, int]:
    """Make a call that succeeds; what is left after it, by name."""
    meter = ledger.meter(tenant)
    with meter.reserve(CallCost(cost) if isinstance(cost, int) else cost):
        pass
    return {allowance.name: allowance.left for allowance in meter.left}


def rows(ids: Sequence[int] | slice, model: str = MODEL) -> CallCost:
    return CallCost(head_rows=ids, model=model, vocab_size=V)


def full(ids: Sequence[int], model: str = MODEL) -> CallCost:
    return CallCost(len(ids), full_distribution=ids, model=model)


def used(store: TenantStore, tenant: str = "acme") -> dict[date, tuple[int, int, int, int, int]]:
    days = read_usage(store.database, since=date.min, tenant=tenant)
    return {d.day: (d.requests, d.refused, d.tokens, d.head_rows, d.full_distributions) for d in days}


def running(store: TenantStore) -> int:
    with store.database.reading() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(RUNNING)) or 0


def test_a_window_takes_calls_until_it_is_used_up_and_says_when_it_ends(
    store: TenantStore, ledger: Ledger, clock: Clock
) -> None:
    store.add("acme", quotas=Quotas(tokens_per_minute=100, tokens_per_day=250))
    clock.now = NOON + 17.25
    assert call(ledger, 60) == {"minute": 40, "day": 190}
    assert call(ledger, 90) == {"minute": 0, "day": 100}  # whole: no call is too large to be ever let in
    with pytest.raises(QuotaExceeded, match="100 tokens of this minute") as caught:
        call(ledger, 1)
    assert caught.value.retry_after_s == 43
    assert "Come back in 43 s, at 12:01 UTC" in caught.value.hint
    clock.now += caught.value.retry_after_s
    assert call(ledger, 100) == {"minute": 0, "day": 0}
    with pytest.raises(QuotaExceeded, match="250 tokens of this day") as caught:
        call(ledger, 1)
    assert caught.value.retry_after_s == 12 * 3600 - 60
    assert "at 00:00 UTC" in caught.value.hint
    assert call(ledger, CallCost()) == {"minute": 0, "day": 0}  # what costs nothing goes on
    clock.now += caught.value.retry_after_s
    assert call(ledger, 1) == {"minute": 99, "day": 249}
    assert used(store) == {TODAY: (4, 2, 250, 0, 0), date(2026, 11, 26): (1, 0, 1, 0, 0)}


def test_tenants_do_not_share_and_limits_change_with_the_next_call(store: TenantStore, ledger: Ledger) -> None:
    store.add("acme", quotas=Quotas(tokens_per_day=10))
    store.add("beta")
    call(ledger, 10)
    assert call(ledger, 1000, "beta") == {}
    with pytest.raises(QuotaExceeded):
        call(ledger, 1)
    store.set_quotas("acme", {"tokens_per_day": 20, "concurrent_requests": 3})
    assert store.all()[0].quotas == Quotas(tokens_per_day=20, concurrent_requests=3)
    assert call(ledger, 1) == {"day": 9, "concurrent": 3}
    store.set_quotas("acme", {"tokens_per_day": None, "concurrent_requests": None})
    assert call(ledger, 10**9) == {}
    assert used(store, "beta") == {TODAY: (1, 0, 1000, 0, 0)}


def test_what_is_being_answered_is_reserved_and_what_was_not_used_is_given_back(
    store: TenantStore, ledger: Ledger, clock: Clock
) -> None:
    store.add("acme", quotas=Quotas(tokens_per_minute=100))
    first = ledger.meter("acme")
    with first.reserve(CallCost(100)) as charge:
        with pytest.raises(QuotaExceeded):
            call(ledger, 1)
        clock.now += 60  # the next minute owes nothing to a call of this one
        assert call(ledger, 10) == {"minute": 90}
        clock.now -= 60
        charge.tokens = 30
    assert [allowance.left for allowance in first.left] == [70]
    failing = ledger.meter("acme")
    with pytest.raises(ZeroDivisionError), failing.reserve(CallCost(70)):
        raise ZeroDivisionError
    assert [allowance.left for allowance in failing.left] == [70]
    assert used(store) == {TODAY: (2, 1, 40, 0, 0)}
    assert running(store) == 0


def test_places_hold_over_all_servers_and_those_of_the_dead_are_free_again(
    store: TenantStore, url: str, clock: Clock
) -> None:
    store.add("acme", quotas=Quotas(concurrent_requests=2, tokens_per_day=1000))
    here, there = Ledger(store.database, clock), Ledger(Database(url), clock)
    with ExitStack() as answering:
        answering.enter_context(here.meter("acme").reserve(CallCost(10)))
        answering.enter_context(there.meter("acme").reserve(CallCost(100)))
        for ledger in (here, there):
            with pytest.raises(QuotaExceeded, match="2 of your requests") as caught:
                call(ledger, 1)
            assert caught.value.retry_after_s == 1
        for _ in range(6):  # `there` has died: nobody renews its call
            clock.now += 9
            here.heartbeat.renew()
        assert call(here, 1) == {"concurrent": 1, "day": 1000 - 10 - 1}
        assert running(store) == 1
    # It had not: it was slow. What it answered is put down nevertheless.
    assert used(store)[TODAY] == (3, 2, 111, 0, 0)
    assert running(store) == 0


@pytest.mark.parametrize("jump", [-1e9, -86_400, -3600, -1, 1, 3600, 86_400, 1e8])
def test_a_clock_that_jumps_locks_nobody_out(store: TenantStore, ledger: Ledger, clock: Clock, jump: float) -> None:
    store.add("acme", quotas=Quotas(tokens_per_minute=10, tokens_per_day=20, concurrent_requests=1))
    call(ledger, 10)

    def let_in() -> None:
        """At once, or when the refusal says."""
        with suppress(QuotaExceeded):
            call(ledger, 1)
            return
        with pytest.raises(QuotaExceeded) as caught:
            call(ledger, 1)
        assert caught.value.retry_after_s is not None
        assert 0 < caught.value.retry_after_s <= 86_400
        clock.now += caught.value.retry_after_s
        call(ledger, 1)

    clock.now += jump
    let_in()
    with ledger.meter("acme").reserve(CallCost(15)):
        clock.now += jump
        ledger.heartbeat.renew()
    let_in()
    clock.now -= 2 * jump
    let_in()
    assert sum(tokens for _, _, tokens, _, _ in used(store).values()) == 10 + 15 + 3
    assert running(store) == 0


@given(st.floats(0, 4e9))
def test_a_window_ends_after_at_most_its_length(seconds: float) -> None:
    at = Instant(seconds)
    for length in (60, 86_400):
        assert 1 <= at.seconds_left_in(length) <= length
    assert Instant(seconds + at.seconds_left_in(60)).minute > at.minute
    assert Instant(seconds + at.seconds_left_in(86_400)).day > at.day


def test_different_head_rows_are_counted_once(store: TenantStore, ledger: Ledger) -> None:
    """The truth is a set of Python's."""
    random = Random(1)
    for tenant in map(str, range(20)):
        store.add(tenant, quotas=Quotas(head_rows=80))
        have = set[int]()
        for _ in range(5):
            ids = random.choices(range(V), k=random.randint(1, 40))
            if len(have | set(ids)) > 80:
                with pytest.raises(
                    BudgetExhausted, match=f"80 different rows of the LM head in all, have {len(have)}, "
                ):
                    call(ledger, rows(ids), tenant)
            else:
                have |= set(ids)
                assert call(ledger, rows(ids), tenant) == {"head-rows": 80 - len(have)}


def test_rows_are_remembered_by_model_and_over_restarts(store: TenantStore, url: str, ledger: Ledger) -> None:
    store.add("acme", quotas=Quotas(head_rows=100))
    assert call(ledger, rows(slice(0, 50))) == {"head-rows": 50}
    again = Ledger(Database(url))
    assert call(again, rows([0, 49, 50, 50])) == {"head-rows": 49}
    assert call(again, rows([0], OTHER_MODEL)) == {"head-rows": 48}
    assert call(again, rows(slice(0, 51))) == {"head-rows": 48}
    with pytest.raises(BudgetExhausted, match="ask for 949 more"):
        call(again, rows(slice(0, V)))
    assert call(again, 5) == {"head-rows": 48}
    assert sum(head_rows for _, _, _, head_rows, _ in used(store).values()) == 50 + 1 + 1


def test_different_full_distributions_are_counted_once_and_their_texts_not_kept(
    store: TenantStore, url: str, ledger: Ledger, tmp_path: Path
) -> None:
    store.add("acme", quotas=Quotas(full_distributions=2))
    store.add("beta", quotas=Quotas(full_distributions=2))
    text = [123_456_789, 987_654_321]
    assert call(ledger, full(text)) == {"full-distributions": 1}
    assert call(Ledger(Database(url)), full(text)) == {"full-distributions": 1}
    assert call(ledger, full(text, OTHER_MODEL)) == {"full-distributions": 0}
    assert call(ledger, full(text)) == {"full-distributions": 0}
    with pytest.raises(BudgetExhausted, match="2 different full distributions in all, have 2"):
        call(ledger, full([1]))
    assert call(ledger, full(text), "beta") == {"full-distributions": 1}
    with store.database.reading() as connection:
        hashes = list(connection.scalars(sa.text("SELECT text_hash FROM full_distributions")))
    assert len(set(hashes)) == 3  # a tenant's tell nothing of another's
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert text[0].to_bytes(4, "little") not in kept


def test_a_call_that_is_broken_off_takes_nothing_along(store: TenantStore, ledger: Ledger) -> None:
    """Or a client could have a second one answered beside it for nothing, and hang up on the first."""
    store.add("acme", quotas=Quotas(full_distributions=1, head_rows=1))
    for cost, name in ((full([1]), "full-distributions"), (rows([7]), "head-rows")):
        with pytest.raises(ZeroDivisionError), ledger.meter("acme").reserve(cost):
            raise ZeroDivisionError
        other = full([2]) if name == "full-distributions" else rows([8])
        with pytest.raises(BudgetExhausted), ledger.meter("acme").reserve(cost):
            assert call(ledger, other)[name] == 0  # which takes the last one meanwhile
        assert call(ledger, other)[name] == 0


def test_no_more_than_the_places_are_ever_taken(store: TenantStore, ledger: Ledger) -> None:
    store.add("acme", quotas=Quotas(concurrent_requests=3))
    with ExitStack() as answering, ThreadPoolExecutor(8) as pool:

        def begin(_: int) -> bool:
            try:
                answering.enter_context(ledger.meter("acme").reserve(CallCost(1)))
            except QuotaExceeded:
                return False
            return True

        assert sum(pool.map(begin, range(24))) == 3
    assert call(ledger, 1) == {"concurrent": 3}


def test_what_cannot_be_counted_is_not_answered(
    url: str, store: TenantStore, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    store.add("acme")
    with (
        pytest.raises(NotReady) as caught,
        ledger.meter("acme").reserve(CallCost(1)),
        store.database.writing() as connection,
    ):
        connection.execute(sa.text("DROP TABLE usage"))
    assert caught.value.retry_after_s
    assert "usage" not in str(caught.value)
    for cost in (CallCost(), CallCost(1), rows([1])):
        with pytest.raises(NotReady):
            call(ledger, cost)
    assert "cannot be used" in caplog.text


def test_a_database_that_is_held_is_waited_for_no_longer_than_is_said(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database_module, "_BUSY_SECONDS", 2.0)
    store, other = TenantStore(url), sa.create_engine(url)
    store.add("acme")
    with other.connect() as stopped:  # a server in the middle of a transaction
        stopped.execute(sa.update(TENANTS).values(disabled_at=None))
        with pytest.raises(NotReady):
            call(Ledger(store.database), 1)
        stopped.rollback()
    other.dispose()
    assert "cannot be used" in caplog.text
    assert call(Ledger(store.database), 1) == {}


def test_tenants_of_before_there_were_quotas_have_none(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "owner.db") as database:
        database.executescript(
            """
            CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY);
            INSERT INTO alembic_version VALUES ('0001');
            CREATE TABLE tenants (
                name VARCHAR(64) NOT NULL PRIMARY KEY, key_id VARCHAR(32) NOT NULL UNIQUE,
                key_hash VARCHAR(64) NOT NULL, scopes VARCHAR(256) NOT NULL,
                created_at DATETIME NOT NULL, disabled_at DATETIME
            );
            INSERT INTO tenants VALUES ('acme', 'k1', 'h1', 'card', '2026-11-24 10:00:00', NULL);
            INSERT INTO tenants VALUES ('beta', 'k2', 'h2', 'card', '2026-11-24 10:00:00', NULL);
            """
        )
    database.close()
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    assert [(tenant.name, tenant.quotas) for tenant in store.all()] == [("acme", Quotas()), ("beta", Quotas())]
    ledger = Ledger(store.database)
    for tenant in ("acme", "beta"):
        assert call(ledger, full([1, 2]), tenant) == {}
    with store.database.reading() as connection:
        assert len(set(connection.scalars(sa.text("SELECT text_hash FROM full_distributions")))) == 2


def test_usage_is_told_by_tenant_and_day(store: TenantStore, ledger: Ledger, clock: Clock) -> None:
    for tenant in ("acme", "beta"):
        store.add(tenant)
        call(ledger, 5, tenant)
    clock.now += 86_400
    call(ledger, full([1, 2, 3]))
    call(ledger, rows([1, 2]))
    tomorrow = date(2026, 11, 26)
    acme = [DayOfUsage("acme", TODAY, 1, 0, 5, 0, 0), DayOfUsage("acme", tomorrow, 2, 0, 3, 2, 1)]
    assert read_usage(store.database, since=TODAY) == [*acme, DayOfUsage("beta", TODAY, 1, 0, 5, 0, 0)]
    assert read_usage(store.database, since=TODAY, tenant="acme") == acme
    assert read_usage(store.database, since=tomorrow) == acme[1:]


def test_an_owner_sets_quotas_and_sees_what_was_used(
    url: str, store: TenantStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEMA_STORE", url)

    def tenants(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pema-server", "tenants", *arguments])
        main()
        return capsys.readouterr().out

    tenants("add", "acme", "--tokens-per-minute", "5", "--full-distributions", "0")
    tenants("set-quotas", "acme", "--tokens-per-minute", "none", "--head-rows", "10")
    (listed,) = json.loads(tenants("list", "--json"))
    quotas = {name: quota for name, quota in listed["quotas"].items() if quota is not None}
    assert quotas == {"full_distributions": 0, "head_rows": 10}
    call(Ledger(store.database), 1234)
    today = datetime.now(UTC).date().isoformat()
    assert tenants("usage", "acme", "--csv").splitlines() == [
        "tenant,day,requests,refused,tokens,head_rows,full_distributions",
        f"acme,{today},1,0,1234,0,0",
    ]
    (day,) = json.loads(tenants("usage", "--json"))
    assert (day["tenant"], day["day"], day["tokens"]) == ("acme", today, 1234)
    row = tenants("usage", "--days", "1").splitlines()[1].split()
    assert row == ["acme", today, "1", "0", "1,234", "0", "0"]
    for mistake, told in (
        (("set-quotas", "acme"), "No quota was given"),
        (("set-quotas", "nobody", "--head-rows", "1"), "no tenant nobody"),
        (("set-quotas", "acme", "--head-rows", "many"), "--head-rows"),
        (("set-quotas", "acme", "--head-rows=-1"), "--head-rows"),
        (("usage", "nobody"), "no tenant nobody"),
    ):
        with pytest.raises(SystemExit, match=told):
            tenants(*mistake)


def test_what_is_left_is_told_as_the_draft_says() -> None:
    allowances = (
        RateLimitStatus("minute", 1000, 900, "tokens", 60, 12),
        RateLimitStatus("head-rows", 500, 0, "head-rows"),
    )
    fields = to_fields(allowances)
    assert fields == {
        "RateLimit": '"minute";r=900;t=12, "head-rows";r=0',
        "RateLimit-Policy": '"minute";q=1000;w=60;qu="tokens", "head-rows";q=500;qu="head-rows"',
    }
    assert from_fields(*fields.values()) == allowances
    assert str(allowances[0]) == "900 of 1,000 tokens, all again in 12 s"
    assert to_fields(()) == {}


@pytest.mark.parametrize(
    ("rate_limit", "policy"),
    [
        ("", ""),
        ("limit=10, remaining=3, reset=5", "10;w=60"),
        ('"minute";r=5', ""),
        ('"minute";r=5', '"minute";q="many";qu="tokens"'),
        ('"minute";r=5', '"minute";q=10'),
        ('"minute";r=-5', '"minute";q=10;qu="tokens"'),
        ('"minute";r=' + "9" * 5000, '"minute";q=10;qu="tokens"'),
        ('"day";r=5', '"minute";q=10;qu="tokens"'),
    ],
)
def test_fields_of_another_kind_tell_nothing(rate_limit: str, policy: str) -> None:
    assert from_fields(rate_limit, policy) == ()


@given(st.text(max_size=60), st.text(max_size=60))
def test_fields_may_be_anything(rate_limit: str, policy: str) -> None:
    from_fields(rate_limit, policy)
