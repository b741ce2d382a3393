"""Authentication by client certificate: its subject's common name is the tenant's name, and a key is optional."""

from __future__ import annotations

import logging

from plm_owner_server.admission.authentication import Authenticator, TenantKeyAuthenticator
from plm_owner_server.admission.tenant_cache import TenantCache
from plm_owner_server.service.metering import Meter
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.master_secret import require_master_secret
from plm_owner_server.tenants.store import Tenant, TenantStore
from protocol.errors import Forbidden, Unauthenticated

log = logging.getLogger(__name__)


class CertificateAuthenticator:
    """Finds the tenants behind client certificates. Thread-safe.

    Args:
        store: the tenants.
    """

    def __init__(self, store: TenantStore) -> None:
        self._store = store
        self._keys = TenantKeyAuthenticator(store)
        self._cache = TenantCache()  # by their names

    def for_name(self, name: str | None) -> Authenticator:
        """An authenticator for a client whose certificate, signed by a CA of the owner, has this common name."""
        return _CertificateAndKey(self, self._keys, name)

    def cached(self, name: str | None) -> Tenant | None:
        """The tenant of this name if it is cached, else None."""
        return self._cache.get(name or "")

    def authenticate(self, name: str | None) -> Tenant:
        """The tenant of this name, from the database.

        Raises:
            Unauthenticated: there is no such tenant, or it is disabled.
            NotReady: the database does not answer.
        """
        tenant = self._cache.fetch(name, lambda: self._store.find_by_name(name)) if name else None
        if tenant is None:
            raise Unauthenticated(
                "The client's certificate names no tenant who may call.",
                hint="Its subject's common name must be your name as a tenant. Ask the owner for one.",
            )
        return tenant

    def close(self) -> None:
        """Close the database."""
        self._keys.close()


class _CertificateAndKey:
    """Authenticator of one client certificate, whose client may also show a key."""

    def __init__(self, tenants: CertificateAuthenticator, keys: TenantKeyAuthenticator, name: str | None) -> None:
        self._tenants = tenants
        self._keys = keys
        self._name = name

    def cached(self, authorization: str | None) -> Tenant | None:
        tenant = self._tenants.cached(self._name)
        if tenant is None or authorization is None:
            return tenant
        key_tenant = self._keys.cached(authorization)
        return None if key_tenant is None else _require_same(tenant, key_tenant)

    def authenticate(self, authorization: str | None) -> Tenant:
        tenant = self._tenants.cached(self._name) or self._tenants.authenticate(self._name)
        return tenant if authorization is None else _require_same(tenant, self._keys.authenticate(authorization))

    def meter(self, tenant: Tenant) -> Meter:
        return self._keys.meter(tenant)

    def close(self) -> None: ...  # the database serves other certificates, too


def certificate_authenticator_for(settings: ServerSettings) -> CertificateAuthenticator | None:
    """The authenticator of a server that demands client certificates; None if it does not.

    Raises:
        PemaError: the store or the master secret cannot be used.
    """
    if settings.tls_client_ca is None:
        return None
    store = TenantStore(settings.store)
    records = store.all()
    require_master_secret(settings, records)
    log.info("%d tenants, each identified by its certificate", len(records))
    return CertificateAuthenticator(store)


def _require_same(tenant: Tenant, key_tenant: Tenant) -> Tenant:
    if tenant.name != key_tenant.name:
        raise Forbidden(
            "The key is not that of the tenant whom the certificate names.",
            hint="Show your own, or none: PEMA_API_KEY.",
        )
    return tenant
