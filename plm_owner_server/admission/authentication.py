"""Authentication of callers by key: no authentication at all, or one key for each tenant."""

from __future__ import annotations

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

_BEARER = "bearer"  # HTTP's schemes may have any case


class Authenticator(Protocol):
    """Finds the tenant behind an HTTP `Authorization` value: `Bearer` and the key."""

    def cached(self, authorization: str | None) -> Tenant | None:
        """The tenant of these credentials if it is cached, else None; never asks a database.

        Raises:
            Unauthenticated: the value has not the form of a key.
        """
        ...

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of these credentials; may wait for a database.

        Raises:
            Unauthenticated: no tenant that may call has this key.
            NotReady: the database does not answer.
        """
        ...

    def meter(self, tenant: Tenant) -> Meter:
        """A meter for one call of this tenant."""
        ...

    def close(self) -> None:
        """Close the database, if there is one."""
        ...


class NoAuthentication:
    """Every client may call, and all are one tenant.

    Args:
        tenant: the tenant that they are.
    """

    def __init__(self, tenant: Tenant = ANONYMOUS) -> None:
        self._tenant = tenant

    def cached(self, authorization: str | None) -> Tenant:
        return self._tenant

    authenticate = cached

    def meter(self, tenant: Tenant) -> Meter:
        return UNMETERED

    def close(self) -> None: ...


class TenantKeyAuthenticator:
    """One key for each tenant. Thread-safe.

    Args:
        store: the tenants.
        ledger: records their usage; by default one in the store's database.
    """

    def __init__(self, store: TenantStore, ledger: Ledger | None = None) -> None:
        self._store = store
        self._ledger = ledger or Ledger(store.database)
        self._cache = TenantCache()  # by the hashes of keys

    def cached(self, authorization: str | None) -> Tenant | None:
        return self._cache.get(_key(authorization).hash)

    def authenticate(self, authorization: str | None) -> Tenant:
        key = _key(authorization)
        tenant = self._cache.get(key.hash) or self._cache.fetch(key.hash, lambda: self._store.find_by_key(key))
        if tenant is None:
            raise _unauthenticated(authorization)
        return tenant

    def meter(self, tenant: Tenant) -> Meter:
        return self._ledger.meter(tenant.name)

    def close(self) -> None:
        self._store.database.close()


def authenticator_for(settings: ServerSettings) -> Authenticator:
    """The authenticator of a server with these settings.

    Raises:
        PemaError: any client could call, or keys could be read on the network, and no flag allows it; or the store or
            the master secret cannot be used.
    """
    store = TenantStore.open_if_exists(settings.store)
    records = [] if store is None else store.all()
    if store is not None and not records:  # no tenant will be looked up
        store.database.close()
    require_master_secret(settings, records)
    if store is None or not records:
        _require_anonymous_allowed(settings)
        return NoAuthentication()
    if not (is_loopback(settings.host) or settings.tls_certificate or settings.insecure):
        raise PemaError(
            f"Keys would travel to {settings.host} unencrypted, for everybody on the way to read.",
            hint="Give --tls-certificate and --tls-key. If something before the server does TLS, say --insecure.",
        )
    log.info("%d tenants, each with a key of its own", len(records))
    return TenantKeyAuthenticator(store)


def _require_anonymous_allowed(settings: ServerSettings) -> None:
    if not (is_loopback(settings.host) or settings.allow_anonymous):
        raise PemaError(
            f"Without tenants, any client that reaches {settings.host} could use the model.",
            hint="Add a tenant: pema-server tenants add NAME. To let every client call, say --allow-anonymous.",
        )
    store = redacted_url(settings.store)
    log.warning("no tenants in %s: every client that reaches %s may call", store, settings.host)


def _key(authorization: str | None) -> Key:
    scheme, _, text = (authorization or "").partition(" ")
    key = Key.parse(text.strip()) if scheme.lower() == _BEARER else None
    if key is None:
        raise _unauthenticated(authorization)
    return key


def _unauthenticated(authorization: str | None) -> Unauthenticated:
    return Unauthenticated(
        "The server asks for a key, and " + ("got another one." if authorization else "got none."),
        hint="Set PEMA_API_KEY to the key that the owner gave you, or say --api-key.",
    )
