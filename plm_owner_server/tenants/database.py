"""Database of the tenants: SQLite by default, PostgreSQL by URL, with the same tables and migrations."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection

from protocol.errors import InvalidRequest, PemaError

_MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic uses globals.
_MIGRATING = threading.Lock()
# Longest wait for the database, or for another process that writes.
_BUSY_SECONDS = 10.0
# Option of a connection whose transactions write.
_WRITES = "pema_writes"


class Database:
    """A database with the newest tables. Thread-safe; several processes may share one.

    Args:
        url: an SQLAlchemy URL, such as sqlite:////var/lib/pema/owner.db or postgresql+psycopg://owner@db/pema.

    Raises:
        InvalidRequest: the URL is malformed or of a database in memory, or its driver is not installed.
        PemaError: the database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        with _url_mistakes_named():
            parsed = sa.make_url(url)
        _require_file(parsed)
        timeouts = {"timeout": _BUSY_SECONDS} if is_sqlite(parsed) else _libpq_timeouts(parsed)
        options: dict[str, Any] = {} if is_sqlite(parsed) else {"pool_timeout": _BUSY_SECONDS}
        with _url_mistakes_named():
            self._engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=timeouts, **options)
        self._writer = self._engine.execution_options(**{_WRITES: True})
        self._writing = threading.Lock()
        if is_sqlite(parsed):
            _lock_sqlite_at_begin(self._engine)
        with _faults_named(self._engine.url):
            self._migrate()

    def close(self) -> None:
        """Close all connections. A later transaction opens new ones."""
        self._engine.dispose()

    def _migrate(self) -> None:
        """Bring the tables up to date; one process at a time."""
        config = Config()
        lock: AbstractContextManager[object] = nullcontext()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        if is_sqlite(self._engine.url):  # it has no advisory locks
            path = Path(self._engine.url.database or "")
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock", timeout=_BUSY_SECONDS)
        with _MIGRATING, lock:
            if is_sqlite(self._engine.url):
                # Stored in the file. Readers then never wait for writers.
                with closing(self._engine.raw_connection()) as raw:
                    raw.cursor().execute("PRAGMA journal_mode = WAL")
            with self._writer.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads.

        Raises:
            PemaError: the database does not answer.
        """
        with _faults_named(self._engine.url), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes. SQLite admits one at a time.

        Raises:
            PemaError: the database does not answer, or others write for too long.
            sqlalchemy.exc.IntegrityError: a statement violates a constraint.
        """
        with _faults_named(self._engine.url), self._turn(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """SQLite allows one writer and makes others poll. Within a process, threads queue on a lock instead."""
        if not is_sqlite(self._engine.url):
            yield
            return
        if not self._writing.acquire(timeout=_BUSY_SECONDS):
            raise TimeoutError("others write for too long")
        try:
            yield
        finally:
            self._writing.release()


def _require_file(url: sa.URL) -> None:
    """Refuse a SQLite database in memory, whose tenants would be gone with the process.

    Raises:
        InvalidRequest: the URL names such a database.
    """
    if is_sqlite(url) and (url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"):
        raise InvalidRequest(
            f"The store {url} would be in memory, and its tenants gone with this process.",
            hint="Give the path of a file, as in sqlite:////var/lib/pema/owner.db.",
        )


def _libpq_timeouts(url: sa.URL) -> dict[str, Any]:
    """Connection arguments that bound PostgreSQL's waits, and transactions of a server that was stopped midway."""
    busy_ms = int(1000 * _BUSY_SECONDS)
    bounded = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    options = " ".join([*url.normalized_query.get("options", ()), *(f"-c {name}={busy_ms}" for name in bounded)])
    return {"connect_timeout": int(_BUSY_SECONDS), "tcp_user_timeout": busy_ms, "options": options}


def _lock_sqlite_at_begin(engine: sa.Engine) -> None:
    """Let transactions that write take SQLite's lock when they begin: after a first read they could not wait for it."""

    @sa.event.listens_for(engine, "connect")
    def connect(raw: DBAPIConnection, _: object) -> None:
        raw.isolation_level = None  # else the driver begins transactions itself
        # A power failure may lose the last few transactions, never the file.
        raw.cursor().execute("PRAGMA synchronous = NORMAL")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _url_mistakes_named() -> Iterator[None]:
    """Turn SQLAlchemy's refusal of a URL into an `InvalidRequest`, without the URL's password."""
    try:
        yield
    except (sa.exc.ArgumentError, ImportError, ValueError) as error:
        # The text of a bad port is not reported: it may be a part of a password.
        reason = "its port is no number" if isinstance(error, ValueError) else error
        raise InvalidRequest(
            f"The store's URL is not usable: {reason}.",
            hint="Give one like sqlite:////var/lib/pema/owner.db; PostgreSQL takes the extra postgres. Passwords "
            "are quoted as in all URLs (%40 for @).",
        ) from None


@contextmanager
def _faults_named(url: sa.URL) -> Iterator[None]:
    """Turn the database's faults into a `PemaError` that names it, without its password."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except (sa.exc.SQLAlchemyError, sqlite3.Error, CommandError, OSError) as error:
        reason, *_ = str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__]
        raise PemaError(f"The store {redacted_url(url)} cannot be used: {reason}.", hint="See --store.") from error


def is_sqlite(url: sa.URL) -> bool:
    """True if a URL names a SQLite file."""
    return url.get_backend_name() == "sqlite"


def redacted_url(url: sa.URL | str) -> str:
    """A store's URL without its password, as it may be logged."""
    return sa.make_url(url).render_as_string(hide_password=True)
