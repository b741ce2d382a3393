"""Tenants: their keys, their store, and who may call a server."""

from __future__ import annotations

import errno
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st

from plm_owner_server.admission import tenant_cache as trust_module
from plm_owner_server.admission.authentication import (
    NoAuthentication,
    TenantKeyAuthenticator,
    authenticator_for,
)
from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.cli import main
from plm_owner_server.cli.tenants import _show_key
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.metering import CallCost
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.api_keys import Key
from plm_owner_server.tenants.scopes import SCOPES
from plm_owner_server.tenants.store import Tenant, TenantStore
from plm_owner_server.tenants.tables import METADATA
from protocol.errors import InvalidRequest, NotReady, PemaError, Unauthenticated
from protocol.types import HeadPolicy


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/new/folder/owner.db"


@pytest.fixture
def store(url: str) -> TenantStore:
    return TenantStore(url)


def test_a_key_is_read_as_it_is_written_and_never_shown_by_accident() -> None:
    for _ in range(50):  # some secrets have an underscore
        key = Key.new()
        assert Key.parse(str(key)) == key
        assert key.secret not in repr(key)
        assert key.matches(key.hash)
        assert not Key.new().matches(key.hash)


@given(st.from_regex(r"pema_[0-9a-fA-F]{15,17}_[\w-]{42,44}", fullmatch=True) | st.text(max_size=12))
def test_what_is_no_key_is_none(text: str) -> None:
    key = Key.parse(text)
    assert key is None or (str(key) == text and text.isascii() and len(text) == 65)


def test_tenants_outlive_the_process_and_their_secrets_are_not_kept(store: TenantStore, url: str) -> None:
    key, other = store.add("acme"), store.add("beta", ["encode", "card"])
    again = TenantStore(url)
    assert again.find_by_key(key) == Tenant("acme", frozenset(SCOPES))
    assert again.find_by_key(other) == Tenant("beta", frozenset(("card", "encode")))
    assert [(tenant.name, tenant.scopes) for tenant in again.all()] == [("acme", SCOPES), ("beta", ("card", "encode"))]
    assert abs((again.all()[0].created_at - datetime.now(UTC)).total_seconds()) < 60
    kept = b"".join(path.read_bytes() for path in Path(sa.make_url(url).database or "").parent.iterdir())
    assert key.id.encode() in kept
    assert key.secret.encode() not in kept


def test_old_keys_wrong_keys_and_keys_of_the_disabled_open_nothing(store: TenantStore) -> None:
    old = store.add("acme")
    new = store.rotate_key("acme")
    assert store.find_by_key(old) is None
    assert store.find_by_key(Key(new.id, old.secret)) is None
    assert store.find_by_key(Key.new()) is None
    assert store.find_by_key(new) is not None
    store.disable("acme")
    assert store.find_by_key(new) is None
    since = store.all()[0].disabled_at
    assert since is not None
    store.disable("acme")
    assert store.all()[0].disabled_at == since
    store.enable("acme")
    assert store.find_by_key(new) is not None


def test_mistakes_are_told(store: TenantStore, url: str, tmp_path: Path) -> None:
    store.add("acme")
    with pytest.raises(InvalidRequest, match="acme already"):
        store.add("acme")
    for name in ("", " acme", "a" * 65, "ac\nme", "Åcme"):
        with pytest.raises(InvalidRequest, match="name has 1 to 64"):
            store.add(name)
    for change in (store.rotate_key, store.disable, store.enable):
        with pytest.raises(InvalidRequest, match="no tenant nobody"):
            change("nobody")
    with pytest.raises(InvalidRequest, match="URL is not usable"):
        TenantStore("owner.db")
    for forgetful in ("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"):
        with pytest.raises(InvalidRequest, match="in memory"):
            TenantStore(forgetful)
    (tmp_path / "text.db").write_text("this is no database, but a text that is long enough to be read as one" * 20)
    with pytest.raises(PemaError, match="cannot be used: file is not a database"):
        TenantStore(f"sqlite:///{tmp_path}/text.db")
    with sqlite3.connect(sa.make_url(url).database or "") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(PemaError, match="Can't locate revision identified by '9999'"):  # a newer server's
        TenantStore(url)


def test_a_key_that_nobody_has_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = MagicMock()
    stream.write.side_effect = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(PemaError, match="key of acme could not be printed: No space left") as caught:
        _show_key("acme", Key.new())
    assert "rotate-key acme" in caught.value.hint


def test_a_password_in_the_url_is_not_told(
    store: TenantStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidRequest, match="its port is no number") as caught:
        TenantStore.open_if_exists("postgresql+psycopg://owner:p@ss:w0rd@db/pema")
    assert "w0rd" not in str(caught.value)
    # As if it were PostgreSQL's: nobody is in it, so that everybody may call.
    monkeypatch.setattr(TenantStore, "open_if_exists", lambda _: store)
    authenticator_for(ServerSettings(_env_file=None, store="postgresql+psycopg://owner:w0rd@db/pema"))
    assert "no tenants in postgresql+psycopg://owner:***@db/pema" in caplog.text


def test_the_migrations_make_the_tables_that_the_code_uses(store: TenantStore, url: str) -> None:
    store.add("acme")
    with sa.create_engine(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        connection.connection.close()


def test_processes_that_start_at_once_make_the_tables_once(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(TenantStore, [url] * 8))
        keys = list(pool.map(lambda number: stores[number].add(f"t{number}"), range(8)))
    assert all(stores[0].find_by_key(key) for key in keys)


def test_a_disabled_tenant_is_out_within_two_seconds(store: TenantStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(trust_module, "time", SimpleNamespace(monotonic=lambda: now))
    keys, shown = TenantKeyAuthenticator(store), f"Bearer {store.add('acme')}"
    assert keys.cached(shown) is None
    assert keys.authenticate(shown) == keys.cached(shown) == Tenant("acme", frozenset(SCOPES))
    store.disable("acme")
    now += 1.9
    assert keys.authenticate(shown).name == "acme"
    now += 0.2
    with pytest.raises(Unauthenticated):
        keys.authenticate(shown)
    store.enable("acme")
    assert keys.authenticate(shown).name == "acme"  # who was refused is not kept out
    for same in (f"{shown} ", shown.replace("Bearer ", "bearer  ")):  # as HTTP allows
        assert keys.authenticate(same).name == "acme"
    for stranger in (None, "", "Bearer ", "Bearer pema_x_y", shown + "x", "Basic YTpi"):
        with pytest.raises(Unauthenticated):
            keys.authenticate(stranger)
    with pytest.raises(Unauthenticated):
        keys.cached(shown.removeprefix("Bearer "))


def test_who_may_call(store: TenantStore, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEMA_API_KEY", "a key of the client on this machine")  # which says nothing of the server

    def settings(**given: object) -> ServerSettings:
        return ServerSettings(_env_file=None, store=url, **given)  # type: ignore[arg-type]

    for host in ("127.0.0.1", "::1", "localhost"):
        assert isinstance(authenticator_for(settings(host=host)), NoAuthentication)
    for host in ("0.0.0.0", "::", "plm.example.com"):  # noqa: S104
        with pytest.raises(PemaError, match="any client that reaches") as caught:
            authenticator_for(settings(host=host))
        assert "--allow-anonymous" in caught.value.hint
        assert isinstance(authenticator_for(settings(host=host, allow_anonymous=True)), NoAuthentication)
    key = store.add("acme")
    keys = authenticator_for(settings(host="0.0.0.0", insecure=True))  # noqa: S104
    assert keys.authenticate(f"Bearer {key}").name == "acme"


def test_without_its_store_a_server_tells_callers_to_come_back(
    store: TenantStore, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(trust_module, "time", SimpleNamespace(monotonic=lambda: now))
    keys, known, unknown = TenantKeyAuthenticator(store), f"Bearer {store.add('acme')}", f"Bearer {store.add('beta')}"
    keys.authenticate(known)
    with sqlite3.connect(sa.make_url(url).database or "") as database:
        database.execute("DROP TABLE tenants")
    database.close()
    now += 1.9
    assert keys.authenticate(known).name == "acme"
    with pytest.raises(NotReady) as caught:  # which clients try again
        keys.authenticate(unknown)
    assert "owner.db" not in str(caught.value)
    assert "no such table" in caplog.text
    now += 0.2
    with pytest.raises(NotReady):
        keys.authenticate(known)


def test_every_policy_can_be_given(
    store: TenantStore, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tenants(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["pema-server", "tenants", *arguments, "--store", url])
        main()
        capsys.readouterr()

    for policy in get_args(HeadPolicy):
        tenants("add", f"early {policy}", "--head-policy", policy)
        tenants("add", f"later {policy}")
        tenants("set-disclosure", f"later {policy}", "--head-policy", policy)
    for tenant in store.all():
        policy = tenant.name.split()[1]
        assert tenant.disclosure == Disclosure(policy, rotated=policy == "candidate")  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="No policy was given"):
        tenants("set-disclosure", "early full", "--rotation", "on")


def test_who_stops_lets_go_of_the_database(store: TenantStore, url: str) -> None:
    key = f"Bearer {store.add('acme')}"
    store.database.close()
    access = authenticator_for(ServerSettings(_env_file=None, store=url))
    controller = AdmissionController(ServingState(), access)
    assert access.authenticate(key).name == "acme"
    log = Path(f"{sa.make_url(url).database}-wal")  # which SQLite keeps for as long as a connection is open
    assert log.exists()
    controller.close()
    assert not log.exists()
    with access.meter(access.authenticate(key)).reserve(CallCost()):  # a call that did not end in time
        pass
    controller.close()
    assert not log.exists()


def test_who_lets_nobody_in_gets_no_database(url: str) -> None:
    assert isinstance(authenticator_for(ServerSettings(_env_file=None, store=url)), NoAuthentication)
    assert not Path(sa.make_url(url).database or "").parent.exists()
