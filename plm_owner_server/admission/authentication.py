"""Who a caller is, by what it shows: anybody, the holder of the one key, or a tenant."""

from __future__ import annotations

import hmac
import logging
from typing import Protocol

from plm_owner_server.admission.ledger import Ledger
from plm_owner_server.admission.tenant_cache import TenantCache
from plm_owner_server.service.metering import UNMETERED, Meter
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.api_keys import Key
from plm_owner_server.tenants.database import redacted_url
from plm_owner_server.tenants.master_secret import require_master_secret
from plm_owner_server.tenants.store import ANONYMOUS, Tenant, TenantStore
from protocol.addresses import is_loopback
from protocol.errors import PemaError, Unauthenticated

log = logging.getLogger(__name__)

_BEARER = "Bearer "


class Authenticator(Protocol):
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


class NoAuthentication:
    """Everybody may call, and all are one tenant.

    Args:
        tenant: the one.
    """

    def __init__(self, tenant: Tenant = ANONYMOUS) -> None:
        self._tenant = tenant

    def recall(self, authorization: str | None) -> Tenant:
        return self._tenant

    identify = recall

    def meter(self, tenant: Tenant) -> Meter:
        return UNMETERED

    def close(self) -> None: ...


class SharedKeyAuthenticator:
    """One key for all.

    Args:
        key: in the clear, as the owner set it.
    """

    def __init__(self, key: str) -> None:
        self._authorization = f"{_BEARER}{key}".encode()

    def recall(self, authorization: str | None) -> Tenant:
        # In constant time, or an attacker could find the key letter by letter.
        if not hmac.compare_digest(self._authorization, (authorization or "").encode()):
            raise _unauthenticated(authorization)
        return ANONYMOUS

    identify = recall

    def meter(self, tenant: Tenant) -> Meter:
        return UNMETERED

    def close(self) -> None: ...


class TenantKeyAuthenticator:
    """A key for each tenant. Thread-safe.

    Args:
        store: of the tenants.
        ledger: keeps their accounts; one in the same database unless given.
    """

    def __init__(self, store: TenantStore, ledger: Ledger | None = None) -> None:
        self._store = store
        self._ledger = ledger or Ledger(store.database)
        self._trusted = TenantCache()  # by the hashes of keys

    def recall(self, authorization: str | None) -> Tenant | None:
        return self._trusted.kept(_key(authorization).hash)

    def identify(self, authorization: str | None) -> Tenant:
        key = _key(authorization)
        tenant = self._trusted.kept(key.hash) or self._trusted.asked(key.hash, lambda: self._store.holder(key))
        if tenant is None:
            raise _unauthenticated(authorization)
        return tenant

    def meter(self, tenant: Tenant) -> Meter:
        return self._ledger.meter(tenant.name)

    def close(self) -> None:
        self._store.database.close()


def authenticator_for(settings: ServerSettings) -> Authenticator:
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
        return SharedKeyAuthenticator(settings.api_key.get_secret_value())
    if store is not None and tenants:
        log.info("%d tenants, each with a key of its own", tenants)
        return TenantKeyAuthenticator(store)
    if not (is_loopback(settings.host) or settings.allow_anonymous):
        raise PemaError(
            f"Without keys, whoever reaches {settings.host} could use the model.",
            hint="Let somebody in: pema-server tenants add NAME. If everybody may call, say --allow-anonymous.",
        )
    log.warning(
        "no tenants in %s and no key: everybody who reaches %s may call", redacted_url(settings.store), settings.host
    )
    return NoAuthentication()


def _key(authorization: str | None) -> Key:
    given = authorization or ""
    key = Key.parse(given.removeprefix(_BEARER)) if given.startswith(_BEARER) else None
    if key is None:
        raise _unauthenticated(authorization)
    return key


def _unauthenticated(authorization: str | None) -> Unauthenticated:
    return Unauthenticated(
        "The server asks for a key, and " + ("got another one." if authorization else "got none."),
        hint="Set PEMA_API_KEY to the key that the owner gave you, or say --api-key.",
    )
