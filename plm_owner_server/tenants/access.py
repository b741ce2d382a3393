"""Who a caller is, by what it shows: anybody, the holder of the one key, or a tenant."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections import OrderedDict
from typing import Protocol

from plm_owner_server.metering import UNMETERED, Meter
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.database import shown
from plm_owner_server.tenants.keys import Key
from plm_owner_server.tenants.ledger import Ledger
from plm_owner_server.tenants.master_secret import require_master_secret
from plm_owner_server.tenants.store import ANYBODY, Tenant, TenantStore
from protocol.addresses import is_loopback
from protocol.errors import NotReady, PemaError, Unauthenticated

log = logging.getLogger(__name__)

_BEARER = "Bearer "
# How long a tenant is taken to be what it was, in seconds: so long a disabled one may go on.
TRUST_S = 2.0
_MOST_KNOWN = 10_000


class Access(Protocol):
    """Tells callers apart, by `Bearer` and the key, as in HTTP's header `Authorization`."""

    def recall(self, authorization: str | None) -> Tenant | None:
        """The tenant who showed this, if that is known without asking a database.

        Raises:
            Unauthenticated: it can be no key.
        """
        ...

    def identify(self, authorization: str | None) -> Tenant:
        """The tenant who showed this. It may take a while.

        Raises:
            Unauthenticated: it is nobody's key.
            NotReady: nobody can tell now.
        """
        ...

    def meter(self, tenant: Tenant) -> Meter:
        """What one call of this tenant's is put down on."""
        ...

    def close(self) -> None:
        """Let go of the database, if there is one."""
        ...


class Anyone:
    """Everybody may call, and all are one tenant.

    Args:
        tenant: the one.
    """

    def __init__(self, tenant: Tenant = ANYBODY) -> None:
        self._tenant = tenant

    def recall(self, authorization: str | None) -> Tenant:
        return self._tenant

    identify = recall

    def meter(self, tenant: Tenant) -> Meter:
        return UNMETERED

    def close(self) -> None: ...


class OneKey:
    """One key for all.

    Args:
        key: in the clear, as the owner set it.
    """

    def __init__(self, key: str) -> None:
        self._authorization = f"{_BEARER}{key}".encode()

    def recall(self, authorization: str | None) -> Tenant:
        # In constant time, or an attacker could find the key letter by letter.
        if not hmac.compare_digest(self._authorization, (authorization or "").encode()):
            raise _stranger(authorization)
        return ANYBODY

    identify = recall

    def meter(self, tenant: Tenant) -> Meter:
        return UNMETERED

    def close(self) -> None: ...


class TenantKeys:
    """A key for each tenant. Thread-safe.

    A key that was good is not asked about again for two seconds, so that a busy tenant does not wait for its turn with
    every call, and a disabled one is out that soon.

    Args:
        store: of the tenants.
        ledger: keeps their accounts; one in the same database unless given.
    """

    def __init__(self, store: TenantStore, ledger: Ledger | None = None) -> None:
        self._store = store
        self._ledger = ledger or Ledger(store.database)
        self._known: OrderedDict[str, tuple[float, Tenant]] = OrderedDict()  # by the hash of what was shown
        self._lock = threading.Lock()

    def recall(self, authorization: str | None) -> Tenant | None:
        return self._kept(_key(authorization))

    def identify(self, authorization: str | None) -> Tenant:
        key = _key(authorization)
        if (tenant := self._kept(key)) is not None:
            return tenant
        try:
            tenant = self._store.holder(key)
        except PemaError as error:
            log.warning("%s", error)
            raise NotReady(
                "The server cannot look keys up at the moment.", hint="Try again in a moment.", retry_after_s=2.0
            ) from None
        with self._lock:
            self._known.pop(key.hash, None)
            if tenant is not None:
                self._known[key.hash] = time.monotonic(), tenant
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        if tenant is None:
            raise _stranger(authorization)
        return tenant

    def meter(self, tenant: Tenant) -> Meter:
        return self._ledger.meter(tenant.name)

    def close(self) -> None:
        self._store.database.close()

    def _kept(self, key: Key) -> Tenant | None:
        """Whose key it was when it was last asked about, if that was lately."""
        with self._lock:
            since, tenant = self._known.get(key.hash, (0.0, None))
        return tenant if time.monotonic() - since < TRUST_S else None


def access_for(settings: ServerSettings) -> Access:
    """Who may call a server with these settings.

    Raises:
        PemaError: everybody who reaches it could, or keys could be read on the way, and that was not said to be meant;
            or the store, or the master secret, cannot be used.
    """
    store = TenantStore.existing(settings.store)
    records = [] if store is None else store.all()
    if store is not None and not records:  # nobody will be looked up
        store.database.close()
    require_master_secret(settings, records)
    tenants = len(records)
    keys = bool(tenants or settings.api_key)
    if keys and not (is_loopback(settings.host) or settings.tls_certificate or settings.insecure):
        raise PemaError(
            f"Keys would travel to {settings.host} unencrypted, for everybody on the way to read.",
            hint="Give --tls-certificate and --tls-key. If something before the server does TLS, say --insecure.",
        )
    if settings.api_key is not None:
        if tenants:
            raise PemaError(
                f"There are {tenants} tenants, each with a key of its own, and one key for all.",
                hint="Leave --api-key (PEMA_API_KEY) away, or name another --store.",
            )
        return OneKey(settings.api_key.get_secret_value())
    if store is not None and tenants:
        log.info("%d tenants, each with a key of its own", tenants)
        return TenantKeys(store)
    if not (is_loopback(settings.host) or settings.allow_anonymous):
        raise PemaError(
            f"Without keys, whoever reaches {settings.host} could use the model.",
            hint="Let somebody in: pema-server tenants add NAME. If everybody may call, say --allow-anonymous.",
        )
    log.warning("no tenants in %s and no key: everybody who reaches %s may call", shown(settings.store), settings.host)
    return Anyone()


def _key(authorization: str | None) -> Key:
    given = authorization or ""
    key = Key.parse(given.removeprefix(_BEARER)) if given.startswith(_BEARER) else None
    if key is None:
        raise _stranger(authorization)
    return key


def _stranger(authorization: str | None) -> Unauthenticated:
    return Unauthenticated(
        "The server asks for a key, and " + ("got another one." if authorization else "got none."),
        hint="Set PEMA_API_KEY to the key that the owner gave you, or say --api-key.",
    )
