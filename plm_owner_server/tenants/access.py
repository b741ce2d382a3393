"""Who a caller is, by what it shows: anybody, the holder of the one key, or a tenant."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from typing import Protocol

from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.keys import Key
from plm_owner_server.tenants.store import ANYBODY, Tenant, TenantStore
from protocol.errors import PemaError, Unauthenticated

log = logging.getLogger(__name__)

_BEARER = "Bearer "
# How long a tenant is taken to be what it was, in seconds: so long a disabled one may go on.
_TRUST_S = 2.0
_MOST_KNOWN = 10_000


class Access(Protocol):
    """Tells callers apart."""

    def identify(self, authorization: str | None) -> Tenant:
        """The tenant who showed this.

        Args:
            authorization: `Bearer` and the key, as in HTTP's header of the name.

        Raises:
            Unauthenticated: it is nobody's key.
        """
        ...


class Anyone:
    """Everybody may call, and all are one tenant."""

    def identify(self, authorization: str | None) -> Tenant:
        return ANYBODY


class OneKey:
    """One key for all.

    Args:
        key: in the clear, as the owner set it.
    """

    def __init__(self, key: str) -> None:
        self._authorization = f"{_BEARER}{key}".encode()

    def identify(self, authorization: str | None) -> Tenant:
        # In constant time, or an attacker could find the key letter by letter.
        if not hmac.compare_digest(self._authorization, (authorization or "").encode()):
            raise _stranger(authorization)
        return ANYBODY


class TenantKeys:
    """A key for each tenant. Thread-safe.

    Args:
        store: of the tenants. It is asked about a key every two seconds at most, so that a disabled tenant is out that
            soon, and a busy one does not wait for the database with every call.
    """

    def __init__(self, store: TenantStore) -> None:
        self._store = store
        self._known: OrderedDict[str, tuple[float, Tenant]] = OrderedDict()  # by the hash of what was shown
        self._lock = threading.Lock()

    def identify(self, authorization: str | None) -> Tenant:
        key = Key.parse((authorization or "").removeprefix(_BEARER))
        if key is None:
            raise _stranger(authorization)
        name, now = f"{key.id} {key.hash}", time.monotonic()
        with self._lock:
            since, tenant = self._known.get(name, (-_TRUST_S, None))
        if tenant is not None and now - since < _TRUST_S:
            return tenant
        tenant = self._store.holder(key)
        with self._lock:
            self._known.pop(name, None)
            if tenant is not None:
                self._known[name] = now, tenant
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        if tenant is None:
            raise _stranger(authorization)
        return tenant


def access_for(settings: ServerSettings) -> Access:
    """Who may call a server with these settings.

    Raises:
        PemaError: everybody who reaches it could, or keys could be read on the way, and that was not said to be meant;
            or the store cannot be used.
    """
    store = TenantStore(settings.store)
    tenants = len(store.all())
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
    if tenants:
        log.info("%d tenants, each with a key of its own", tenants)
        return TenantKeys(store)
    if not (is_loopback(settings.host) or settings.allow_anonymous):
        raise PemaError(
            f"Without keys, whoever reaches {settings.host} could use the model.",
            hint="Let somebody in: pema-server tenants add NAME. If everybody may call, say --allow-anonymous.",
        )
    return Anyone()


def is_loopback(host: str) -> bool:
    """Whether only this very machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stranger(authorization: str | None) -> Unauthenticated:
    return Unauthenticated(
        "The server asks for a key, and " + ("got another one." if authorization else "got none."),
        hint="Set PEMA_API_KEY to the key that the owner gave you, or say --api-key.",
    )
