"""Calls that this server is answering, as far as other servers must know of them."""

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

_EVERY_S = 10.0
# Minutes that are kept: who answers a call for longer finds its minute gone, and over anyway.
_KEPT_MINUTES = 60


class ReservationHeartbeat:
    """Renews this server's calls in the database, so that they do not pass for those of a server that died.

    A thread does it while there are any. Thread-safe.

    Args:
        database: they are in.
        clock: seconds from 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._ids: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, call_id: str) -> None:
        """Renew a call from now on."""
        with self._lock:
            self._ids.add(call_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="running-calls", daemon=True)
                self._thread.start()

    def remove(self, call_id: str) -> None:
        """Renew it no more."""
        with self._lock:
            self._ids.discard(call_id)

    def renew(self) -> None:
        """Renew all, and clear away what other servers left behind.

        Raises:
            PemaError: the database does not answer.
        """
        with self._lock:
            ids = list(self._ids)
        at = Instant(self._clock())
        with self._database.writing() as connection:
            connection.execute(sa.update(RUNNING).where(RUNNING.c.id.in_(ids)).values(seen_at=at.seconds))
            connection.execute(sa.delete(RUNNING).where(~is_alive(at.seconds)))
            recent = MINUTES.c.minute.between(at.minute - _KEPT_MINUTES, at.minute + _KEPT_MINUTES)
            connection.execute(sa.delete(MINUTES).where(~recent))

    def _work(self) -> None:
        while True:
            time.sleep(_EVERY_S)
            try:
                self.renew()
            except PemaError as error:
                log.warning("%s", error)
            with self._lock:
                if not self._ids:
                    self._thread = None
                    return
