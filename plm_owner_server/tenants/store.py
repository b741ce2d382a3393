"""Where tenants are kept: SQLite by default, PostgreSQL by URL; the same tables, by the same migrations."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy.engine import Connection, Row

from plm_owner_server.tenants.keys import Key
from protocol.errors import InvalidRequest, PemaError

Scope = Literal["card", "head", "encode", "decode", "distribution"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a tenant may be allowed: card and tokenizer; rows of the LM head; and the calls of these names."""
_MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic works on globals.
_MIGRATING = threading.Lock()
_NO_HASH = "0" * 64
# Longest wait for the database, or for another process that writes, in seconds.
_BUSY_S = 10.0

METADATA = sa.MetaData()
_TENANTS = sa.Table(
    "tenants",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(32), nullable=False, unique=True),
    sa.Column("key_hash", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(256), nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("disabled_at", sa.DateTime(timezone=True)),
)


@dataclass(frozen=True)
class Tenant:
    """Who calls, and what it may do."""

    name: str
    scopes: frozenset[Scope]


ANYBODY = Tenant("", frozenset(SCOPES))
"""The one tenant of a server that does not ask for keys."""


@dataclass(frozen=True)
class TenantRecord:
    """What the store tells of a tenant.

    Attributes:
        key_id: the public part of its key.
        disabled_at: None for one that may call.
    """

    name: str
    scopes: tuple[Scope, ...]
    key_id: str
    created_at: datetime
    disabled_at: datetime | None


class TenantStore:
    """Tenants in a database. Thread-safe; several processes may share one.

    Args:
        url: SQLAlchemy's, such as sqlite:////var/lib/pema/owner.db or postgresql+psycopg://owner@db/pema.

    Raises:
        InvalidRequest: the URL is none, or its driver is not installed.
        PemaError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
            timeout = {"timeout": _BUSY_S} if _is_sqlite(parsed) else {"connect_timeout": int(_BUSY_S)}
            options: dict[str, Any] = {} if _is_sqlite(parsed) else {"pool_timeout": _BUSY_S}
            self._engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=timeout, **options)
        except (sa.exc.ArgumentError, ImportError) as error:
            raise InvalidRequest(
                f"The store's URL is not usable: {error}.",
                hint="Give one like sqlite:////var/lib/pema/owner.db; PostgreSQL takes the extra postgres.",
            ) from error
        with _told(self._engine.url):
            self._migrate()

    @classmethod
    def existing(cls, url: str) -> Self | None:
        """The store, or None if it is a file that is not there: then nobody was ever let in."""
        with suppress(sa.exc.ArgumentError):
            parsed = sa.make_url(url)
            if _is_sqlite(parsed) and not Path(parsed.database or "").exists():
                return None
        return cls(url)

    def _migrate(self) -> None:
        """Bring the tables up to date; one process at a time."""
        config = Config()
        lock: AbstractContextManager[object] = nullcontext()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        if _is_sqlite(self._engine.url):  # which has no lock of its own for this, as others do
            path = Path(self._engine.url.database or "")
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock", timeout=_BUSY_S)
        with _MIGRATING, lock, self._engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def add(self, name: str, scopes: Sequence[Scope] = SCOPES) -> Key:
        """A new tenant's key, which can never be had again.

        Raises:
            InvalidRequest: there is a tenant of that name, or it is no name.
        """
        if not (0 < len(name) <= 64 and name.isprintable() and name.isascii() and name == name.strip()):
            raise InvalidRequest(
                "That is no name for a tenant.", hint="Take up to 64 printable ASCII characters, no spaces around them."
            )
        key = Key.new()
        values = {"name": name, "key_id": key.id, "key_hash": key.hash, "scopes": " ".join(sorted(set(scopes)))}
        try:
            with self._begin() as connection:
                connection.execute(sa.insert(_TENANTS).values(created_at=datetime.now(UTC), **values))
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

    def disable(self, name: str) -> None:
        """Let a tenant in no more; what is known of it stays.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, {"disabled_at": sa.func.coalesce(_TENANTS.c.disabled_at, datetime.now(UTC))})

    def enable(self, name: str) -> None:
        """Let a tenant in again.

        Raises:
            InvalidRequest: there is no such tenant.
        """
        self._update(name, {"disabled_at": None})

    def all(self) -> list[TenantRecord]:
        """All tenants, by name."""
        with self._begin() as connection:
            return [_record(row) for row in connection.execute(sa.select(_TENANTS).order_by(_TENANTS.c.name))]

    def holder(self, key: Key) -> Tenant | None:
        """Whose key it is; None if it is nobody's, or its tenant is disabled."""
        with self._begin() as connection:
            row = connection.execute(sa.select(_TENANTS).where(_TENANTS.c.key_id == key.id)).first()
        # A key that nobody has takes as long as a wrong one.
        if not key.matches(_NO_HASH if row is None else row.key_hash) or row is None or row.disabled_at is not None:
            return None
        return Tenant(row.name, frozenset(_record(row).scopes))

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name; None if there is none, or it is disabled."""
        with self._begin() as connection:
            row = connection.execute(sa.select(_TENANTS).where(_TENANTS.c.name == name)).first()
        if row is None or row.disabled_at is not None:
            return None
        return Tenant(row.name, frozenset(_record(row).scopes))

    def _update(self, name: str, values: dict[str, object]) -> None:
        with self._begin() as connection:
            if connection.execute(sa.update(_TENANTS).where(_TENANTS.c.name == name).values(values)).rowcount == 0:
                raise InvalidRequest(f"There is no tenant {name}.", hint="See pema-server tenants list.")

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with _told(self._engine.url), self._engine.begin() as connection:
            yield connection


@contextmanager
def _told(url: sa.URL) -> Iterator[None]:
    """Turn the database's own faults into an error that names it, without its password."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except (sa.exc.SQLAlchemyError, CommandError, OSError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0]
        raise PemaError(
            f"The store {url.render_as_string(hide_password=True)} cannot be used: {reason}.", hint="See --store."
        ) from error


def _is_sqlite(url: sa.URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _record(row: Row[Any]) -> TenantRecord:
    scopes = tuple(scope for scope in SCOPES if scope in row.scopes.split())
    disabled_at = None if row.disabled_at is None else _utc(row.disabled_at)
    return TenantRecord(row.name, scopes, row.key_id, _utc(row.created_at), disabled_at)


def _utc(moment: datetime) -> datetime:
    # SQLite forgets the zone, PostgreSQL gives its own.
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
