"""Where tenants are kept, with what each of them may do and use."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Row

from plm_owner_server.service.disclosure import FULL_DISCLOSURE, Disclosure
from plm_owner_server.tenants.api_keys import Key
from plm_owner_server.tenants.database import Database, is_sqlite
from plm_owner_server.tenants.quotas import Quotas, quotas_of
from plm_owner_server.tenants.tables import TENANTS
from protocol.errors import InvalidRequest

Scope = Literal["card", "head", "encode", "decode", "distribution"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a tenant may be allowed: card and tokenizer; rows of the LM head; and the calls of these names."""
_NO_HASH = "0" * 64
_SECRET_BYTES = 32
_WITHOUT_LIMIT = Quotas()


@dataclass(frozen=True)
class Tenant:
    """Who calls, and what it may do."""

    name: str
    scopes: frozenset[Scope]
    disclosure: Disclosure = FULL_DISCLOSURE


ANONYMOUS = Tenant("", frozenset(SCOPES))
"""The one tenant of a server that does not ask for keys."""


@dataclass(frozen=True)
class TenantRecord:
    """What the store tells of a tenant.

    Attributes:
        key_id: the public part of its key.
        disclosure: what it may see of the model.
        disabled_at: None for one that may call.
        quotas: what it may use.
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
        url: of the database; see `Database`.

    Attributes:
        database: for what else belongs to tenants.

    Raises:
        InvalidRequest: the URL is none, or its driver is not installed.
        PemaError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.database = Database(url)

    @classmethod
    def existing(cls, url: str) -> Self | None:
        """The store, or None if it is a file that is not there: then nobody was ever let in."""
        with suppress(sa.exc.ArgumentError, ValueError):  # which is told when it is opened
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
        quotas: Quotas = _WITHOUT_LIMIT,
    ) -> Key:
        """A new tenant's key, which can never be had again.

        Raises:
            InvalidRequest: there is a tenant of that name, or it is no name.
        """
        if not (0 < len(name) <= 64 and name.isprintable() and name.isascii() and name == name.strip()):
            raise InvalidRequest(
                "That is no name for a tenant.", hint="Take up to 64 printable ASCII characters, no spaces around them."
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
        """A new key for a tenant; the old one is none from now on.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        key = Key.new()
        self._update(name, {"key_id": key.id, "key_hash": key.hash})
        return key

    def disclose(self, name: str, disclosure: Disclosure) -> None:
        """Let a tenant see more or less of the model; its memories and adapters fit no more.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, asdict(disclosure))

    def disable(self, name: str) -> None:
        """Let a tenant in no more; what is known of it stays.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, {"disabled_at": sa.func.coalesce(TENANTS.c.disabled_at, datetime.now(UTC))})

    def enable(self, name: str) -> None:
        """Let a tenant in again.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, {"disabled_at": None})

    def limit(self, name: str, quotas: Mapping[str, int | None]) -> None:
        """Change some of a tenant's quotas, from its next call on.

        Args:
            name: the tenant.
            quotas: by their names in `Quotas`; None takes a limit away.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, dict(quotas))

    def all(self) -> list[TenantRecord]:
        """All tenants, by name."""
        with self.database.reading() as connection:
            return [_record(row) for row in connection.execute(sa.select(TENANTS).order_by(TENANTS.c.name))]

    def holder(self, key: Key) -> Tenant | None:
        """Whose key it is; None if it is nobody's, or its tenant is disabled."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(TENANTS).where(TENANTS.c.key_id == key.id)).first()
        # A key that nobody has takes as long as a wrong one.
        if not key.matches(_NO_HASH if row is None else row.key_hash) or row is None or row.disabled_at is not None:
            return None
        return _tenant(row)

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name; None if there is none, or it is disabled."""
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
    disclosure, quotas = Disclosure(row.head_policy, row.rotated), quotas_of(row)
    return TenantRecord(row.name, scopes, row.key_id, disclosure, _utc(row.created_at), disabled_at, quotas)


def _utc(moment: datetime) -> datetime:
    # SQLite forgets the zone, PostgreSQL gives its own.
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
