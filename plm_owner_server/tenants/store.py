"""Store of the tenants: names, keys, scopes, disclosure and quotas."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Row

from plm_owner_server.service.disclosure import FULL_DISCLOSURE, Disclosure
from plm_owner_server.tenants.api_keys import Key
from plm_owner_server.tenants.database import Database, is_sqlite
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.scopes import SCOPES, Scope
from plm_owner_server.tenants.tables import TENANTS
from protocol.errors import InvalidRequest

_NO_HASH = "0" * 64
_SECRET_BYTES = 32
_NO_LIMITS = Quotas()


@dataclass(frozen=True)
class Tenant:
    """An authenticated tenant.

    Attributes:
        name: the tenant's name; empty for the anonymous tenant.
        scopes: calls that it may make.
        disclosure: parts of the model that it may see.
    """

    name: str
    scopes: frozenset[Scope]
    disclosure: Disclosure = FULL_DISCLOSURE


ANONYMOUS = Tenant("", frozenset(SCOPES))
"""The one tenant of a server without authentication."""


@dataclass(frozen=True)
class TenantRecord:
    """A tenant as stored.

    Attributes:
        name: the tenant's name.
        scopes: calls that it may make.
        key_id: the public part of its key.
        disclosure: parts of the model that it may see.
        created_at: the time at which it was added, UTC.
        disabled_at: the time at which it was disabled, UTC; None for an active tenant.
        quotas: its limits.
    """

    name: str
    scopes: tuple[Scope, ...]
    key_id: str
    disclosure: Disclosure
    created_at: datetime
    disabled_at: datetime | None
    quotas: Quotas


class TenantStore:
    """Tenants in a database. Thread-safe; several processes may share one.

    Args:
        url: SQLAlchemy URL of the database; see `Database`.

    Attributes:
        database: also holds the tenants' usage.

    Raises:
        InvalidRequest: the URL is malformed, or its driver is not installed.
        PemaError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.database = Database(url)

    @classmethod
    def open_if_exists(cls, url: str) -> Self | None:
        """The store, or None if it is a file that does not exist, so that no tenant was ever added."""
        with suppress(sa.exc.ArgumentError, ValueError):  # reported when the store is opened
            parsed = sa.make_url(url)
            if is_sqlite(parsed) and not Path(parsed.database or "").exists():
                return None
        return cls(url)

    def add(
        self,
        name: str,
        scopes: Sequence[Scope] = SCOPES,
        *,
        disclosure: Disclosure = FULL_DISCLOSURE,
        quotas: Quotas = _NO_LIMITS,
    ) -> Key:
        """Add a tenant, and return its key, which cannot be read again.

        Raises:
            InvalidRequest: a tenant of that name exists, or the name is malformed.
        """
        if not (0 < len(name) <= 64 and name.isprintable() and name.isascii() and name == name.strip()):
            raise InvalidRequest(
                "A tenant's name has 1 to 64 printable ASCII characters, without spaces around them.",
                hint="Choose another.",
            )
        key = Key.new()
        values: dict[str, object] = {
            "name": name,
            "key_id": key.id,
            "key_hash": key.hash,
            "scopes": " ".join(sorted(set(scopes))),
            "created_at": datetime.now(UTC),
            "text_secret": secrets.token_bytes(_SECRET_BYTES),
        }
        values |= asdict(disclosure) | asdict(quotas)
        try:
            with self.database.writing() as connection:
                connection.execute(sa.insert(TENANTS).values(values))
        except sa.exc.IntegrityError:
            raise InvalidRequest(
                f"There is a tenant {name} already.", hint="Take another name, or give it a new key: rotate-key."
            ) from None
        return key

    def rotate_key(self, name: str) -> Key:
        """Replace a tenant's key, and return the new one. The old key stops working at once in the database.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        key = Key.new()
        self._update(name, {"key_id": key.id, "key_hash": key.hash})
        return key

    def set_disclosure(self, name: str, disclosure: Disclosure) -> None:
        """Change what a tenant sees of the model. Its memories and adapters no longer fit.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, asdict(disclosure))

    def disable(self, name: str) -> None:
        """Refuse a tenant's calls from now on. Its record and its usage stay.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, {"disabled_at": sa.func.coalesce(TENANTS.c.disabled_at, datetime.now(UTC))})

    def enable(self, name: str) -> None:
        """Admit a disabled tenant again.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, {"disabled_at": None})

    def set_quotas(self, name: str, quotas: Mapping[str, int | None]) -> None:
        """Change some of a tenant's quotas, from its next call on.

        Args:
            name: the tenant's name.
            quotas: new limits by field name of `Quotas`; None removes a limit.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, dict(quotas))

    def all(self) -> list[TenantRecord]:
        """All tenants, by name."""
        with self.database.reading() as connection:
            return [_record(row) for row in connection.execute(sa.select(TENANTS).order_by(TENANTS.c.name))]

    def find_by_key(self, key: Key) -> Tenant | None:
        """The tenant with this key; None if there is none, or it is disabled."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(TENANTS).where(TENANTS.c.key_id == key.id)).first()
        # An unknown key id takes as long as a wrong secret.
        if not key.matches(_NO_HASH if row is None else row.key_hash) or row is None or row.disabled_at is not None:
            return None
        return _tenant(row)

    def find_by_name(self, name: str) -> Tenant | None:
        """The tenant of this name; None if there is none, or it is disabled."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(TENANTS).where(TENANTS.c.name == name)).first()
        return None if row is None or row.disabled_at is not None else _tenant(row)

    def _update(self, name: str, values: dict[str, object]) -> None:
        with self.database.writing() as connection:
            if connection.execute(sa.update(TENANTS).where(TENANTS.c.name == name).values(values)).rowcount == 0:
                raise InvalidRequest(f"There is no tenant {name}.", hint="See pema-server tenants list.")


def _tenant(row: Row[Any]) -> Tenant:
    record = _record(row)
    return Tenant(record.name, frozenset(record.scopes), record.disclosure)


def _record(row: Row[Any]) -> TenantRecord:
    scopes = tuple(scope for scope in SCOPES if scope in row.scopes.split())
    disabled_at = None if row.disabled_at is None else _utc(row.disabled_at)
    disclosure, quotas = Disclosure(row.head_policy, row.rotated), Quotas.from_row(row)
    return TenantRecord(row.name, scopes, row.key_id, disclosure, _utc(row.created_at), disabled_at, quotas)


def _utc(moment: datetime) -> datetime:
    # SQLite drops the time zone, PostgreSQL returns the session's.
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
