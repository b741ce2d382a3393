"""Whom the server knows without asking the database, since it did so a moment ago."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from plm_owner_server.tenants.store import Tenant
from protocol.errors import NotReady, PemaError

log = logging.getLogger(__name__)

# How long a tenant is taken to be what it was, in seconds: so long a disabled one may go on.
_TRUST_S = 2.0
_MOST_KNOWN = 10_000


class TenantCache:
    """Tenants by what they showed. Thread-safe.

    Who was let in is not asked about again for two seconds, so that a busy tenant does not wait for its turn with every
    call, and a disabled one is out that soon.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[float, Tenant]] = OrderedDict()
        self._lock = threading.Lock()

    def kept(self, shown: str) -> Tenant | None:
        """Who showed this when it was last asked about, if that was lately."""
        with self._lock:
            since, tenant = self._known.get(shown, (0.0, None))
        return tenant if time.monotonic() - since < _TRUST_S else None

    def asked(self, shown: str, ask: Callable[[], Tenant | None]) -> Tenant | None:
        """Who shows this, as the database says; None for nobody, which is not kept.

        Args:
            shown: what it is, or a hash of it.
            ask: asks the database.

        Raises:
            NotReady: nobody can tell now.
        """
        try:
            tenant = ask()
        except PemaError as error:
            log.warning("%s", error)
            raise NotReady(
                "The server cannot look callers up at the moment.", hint="Try again in a moment.", retry_after_s=2.0
            ) from None
        with self._lock:
            self._known.pop(shown, None)
            if tenant is not None:
                self._known[shown] = time.monotonic(), tenant
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        return tenant
