"""Cache of authenticated tenants, so that a busy tenant does not wait for the database with every call."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from plm_owner_server.tenants.store import Tenant
from protocol.errors import NotReady, PemaError

log = logging.getLogger(__name__)

# A disabled tenant may call for this long.
_TTL_SECONDS = 2.0
_MAX_ENTRIES = 10_000


class TenantCache:
    """Tenants by credential. An entry expires after two seconds. Thread-safe."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, tuple[float, Tenant]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, credential: str) -> Tenant | None:
        """The cached tenant of this credential, or None if there is no entry or it has expired."""
        with self._lock:
            since, tenant = self._entries.get(credential, (0.0, None))
        return tenant if time.monotonic() - since < _TTL_SECONDS else None

    def fetch(self, credential: str, look_up: Callable[[], Tenant | None]) -> Tenant | None:
        """Look the tenant up in the database, and cache it. None, for no tenant, is not cached.

        Args:
            credential: the cache's key: a name, or a key's hash.
            look_up: asks the database.

        Raises:
            NotReady: the database does not answer.
        """
        try:
            tenant = look_up()
        except PemaError as error:
            log.warning("%s", error)
            raise NotReady(
                "The server cannot look callers up at the moment.", hint="Try again in a moment.", retry_after_s=2.0
            ) from None
        with self._lock:
            self._entries.pop(credential, None)
            if tenant is not None:
                self._entries[credential] = time.monotonic(), tenant
                if len(self._entries) > _MAX_ENTRIES:
                    self._entries.popitem(last=False)
        return tenant
