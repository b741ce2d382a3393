"""The secret that rotations follow from: made once, for its owner's eyes, never made anew by accident."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from plm_owner_server.admission.authentication import authenticator_for
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.tenants.master_secret import master_secret
from plm_owner_server.tenants.store import TenantStore
from protocol.errors import PemaError, Unsupported
from tests.support import make_settings


def test_it_is_made_once_beside_the_store(tmp_path: Path) -> None:
    settings = make_settings(store=f"sqlite:///{tmp_path}/owner.db")
    with ThreadPoolExecutor(8) as threads:
        secrets = set(threads.map(lambda _: master_secret(settings), range(16)))
    assert len(secrets) == 1
    (path,) = tmp_path.iterdir()
    assert path.name == "owner.db.secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert secrets == {path.read_bytes()}
    assert len(path.read_bytes()) == 64
    path.write_bytes(path.read_bytes() + b"\n")  # restored by hand
    assert secrets == {master_secret(settings)}
    path.write_bytes(path.read_bytes().strip()[:-1])
    with pytest.raises(PemaError, match="damaged"):
        master_secret(settings)


def test_it_may_be_given_and_must_be_where_servers_share_a_store(tmp_path: Path) -> None:
    given = make_settings(store=f"sqlite:///{tmp_path}/owner.db", master_secret="s" * 32)
    assert master_secret(given) == b"s" * 32
    assert list(tmp_path.iterdir()) == []
    assert "ssss" not in repr(given)
    with pytest.raises(Unsupported, match="no master secret") as caught:
        master_secret(make_settings(store="postgresql+psycopg://owner@db/pema"))
    assert "PEMA_MASTER_SECRET" in caught.value.hint
    with pytest.raises(PemaError, match="cannot be used"):
        master_secret(make_settings(store=f"sqlite:///{tmp_path}/nowhere/owner.db"))


def test_a_server_does_not_start_with_a_damaged_one_if_it_needs_it(tmp_path: Path) -> None:
    settings = make_settings(store=f"sqlite:///{tmp_path}/owner.db")
    store, damaged = TenantStore(settings.store), tmp_path / "owner.db.secret"
    damaged.write_text("half")
    store.add("ourselves")
    authenticator_for(settings)
    store.add("acme", disclosure=Disclosure("candidate", rotated=True))
    with pytest.raises(PemaError, match="damaged"):
        authenticator_for(settings)
