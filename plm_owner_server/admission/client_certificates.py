"""Tenants that show a certificate: its subject's common name is the tenant's, and a key is not needed."""

from __future__ import annotations

import logging

from plm_owner_server.admission.authentication import Authenticator, TenantKeyAuthenticator
from plm_owner_server.admission.tenant_cache import TenantCache
from plm_owner_server.service.metering import Meter
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.master_secret import require_master_secret
from plm_owner_server.tenants.store import Tenant, TenantStore
from protocol.errors import Forbidden, InvalidRequest, Unauthenticated

log = logging.getLogger(__name__)


class CertificateAuthenticator:
    """Who the holders of certificates are. Thread-safe.

    Args:
        store: of the tenants.
    """

    def __init__(self, store: TenantStore) -> None:
        self._store = store
        self._keys = TenantKeyAuthenticator(store)
        self._trusted = TenantCache()  # by their names

    def of(self, name: str | None) -> Authenticator:
        """Tells who a caller is whose certificate, of an authority of ours, has this common name."""
        return _CertificateAndKey(self, self._keys, name)

    def kept(self, name: str | None) -> Tenant | None:
        """The tenant of that name, if it was let in lately."""
        return self._trusted.kept(name or "")

    def ask(self, name: str | None) -> Tenant:
        """The tenant of that name, from the database.

        Raises:
            Unauthenticated: there is none, or it is disabled.
            NotReady: nobody can tell now.
        """
        tenant = self._trusted.asked(name, lambda: self._store.named(name)) if name else None
        if tenant is None:
            raise Unauthenticated(
                "The client's certificate names no tenant who may call.",
                hint="Its subject's common name must be your name as a tenant. Ask the owner for one.",
            )
        return tenant

    def close(self) -> None:
        """Let go of the database."""
        self._keys.close()


class _CertificateAndKey:
    """The holder of one certificate, who may show a key besides."""

    def __init__(self, tenants: CertificateAuthenticator, keys: TenantKeyAuthenticator, name: str | None) -> None:
        self._tenants = tenants
        self._keys = keys
        self._name = name

    def recall(self, authorization: str | None) -> Tenant | None:
        tenant = self._tenants.kept(self._name)
        if tenant is None or authorization is None:
            return tenant
        holder = self._keys.recall(authorization)
        return None if holder is None else _same(tenant, holder)

    def identify(self, authorization: str | None) -> Tenant:
        tenant = self._tenants.kept(self._name) or self._tenants.ask(self._name)
        return tenant if authorization is None else _same(tenant, self._keys.identify(authorization))

    def meter(self, tenant: Tenant) -> Meter:
        return self._keys.meter(tenant)

    def close(self) -> None: ...  # others hold certificates, too


def certificate_authenticator_for(settings: ServerSettings) -> CertificateAuthenticator | None:
    """Who may call a server that demands certificates; None if it does not.

    Raises:
        PemaError: there is one key for all besides, or the store, or the master secret, cannot be used.
    """
    if settings.tls_client_ca is None:
        return None
    if settings.api_key is not None:
        raise InvalidRequest(
            "Clients are told apart by their certificates, and there is one key for all.",
            hint="Leave --api-key (PEMA_API_KEY) away, or --tls-client-ca.",
        )
    store = TenantStore(settings.store)
    records = store.all()
    require_master_secret(settings, records)
    log.info("%d tenants, each known by its certificate", len(records))
    return CertificateAuthenticator(store)


def _same(tenant: Tenant, holder: Tenant) -> Tenant:
    if tenant.name != holder.name:
        raise Forbidden(
            "The key is not that of the tenant whom the certificate names.",
            hint="Show your own, or none: PEMA_API_KEY.",
        )
    return tenant
