"""Heartbeat that renews the reservations of calls that this server is answering."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from plm_owner_server.admission.account import is_alive
from plm_owner_server.admission.quota_rules import Instant
from plm_owner_server.tenants.database import Database
from plm_owner_server.tenants.tables import MINUTES, RUNNING
from protocol.errors import PemaError

log = logging.getLogger(__name__)

_PERIOD_SECONDS = 10.0
# Older rows of MINUTES are deleted. A call that takes longer finds its minute deleted, and long over anyway.
_RETAINED_MINUTES = 60


class ReservationHeartbeat:
    """Renews this server's reservations in the database, so that other servers do not take them for abandoned.

    A thread renews them while there are any. Thread-safe.

    Args:
        database: the database with the reservations.
        clock: returns Unix time.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._ids: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, call_id: str) -> None:
        """Renew a call's reservation from now on."""
        with self._lock:
            self._ids.add(call_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="running-calls", daemon=True)
                self._thread.start()

    def remove(self, call_id: str) -> None:
        """Stop renewing a call's reservation."""
        with self._lock:
            self._ids.discard(call_id)

    def renew(self) -> None:
        """Renew all, and delete reservations that other servers abandoned.

        Raises:
            PemaError: the database does not answer.
        """
        with self._lock:
            ids = list(self._ids)
        at = Instant(self._clock())
        with self._database.writing() as connection:
            connection.execute(sa.update(RUNNING).where(RUNNING.c.id.in_(ids)).values(seen_at=at.seconds))
            connection.execute(sa.delete(RUNNING).where(~is_alive(at.seconds)))
            recent = MINUTES.c.minute.between(at.minute - _RETAINED_MINUTES, at.minute + _RETAINED_MINUTES)
            connection.execute(sa.delete(MINUTES).where(~recent))

    def _work(self) -> None:
        while True:
            time.sleep(_PERIOD_SECONDS)
            try:
                self.renew()
            except PemaError as error:
                log.warning("%s", error)
            with self._lock:
                if not self._ids:
                    self._thread = None
                    return
