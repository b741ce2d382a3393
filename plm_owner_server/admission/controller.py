"""Admission of a call: its tenant, by key or certificate, and the scope that the tenant needs."""

from __future__ import annotations

from anyio import CapacityLimiter

from plm_owner_server.admission.allowed_hosts import ANY_HOST, AllowedHosts
from plm_owner_server.admission.authentication import Authenticator, NoAuthentication
from plm_owner_server.admission.client_certificates import CertificateAuthenticator
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.service.worker_threads import run_in_worker
from plm_owner_server.tenants.scopes import Scope
from protocol.errors import Forbidden

# Keys that are looked up in the database at the same time.
_MAX_LOOKUPS = 8


class AdmissionController:
    """Admits calls to a server's service.

    Args:
        state: has the service.
        authenticator: finds the tenant of a key; without one, everybody may call.
        certificates: finds the tenant of a client's certificate; goes before `authenticator`.
        hosts: hosts that requests may name where everybody may call; by default loopback ones.
    """

    def __init__(
        self,
        state: ServingState,
        authenticator: Authenticator | None = None,
        certificates: CertificateAuthenticator | None = None,
        hosts: AllowedHosts | None = None,
    ) -> None:
        self.state = state
        self._authenticator = authenticator or NoAuthentication()
        self._certificates = certificates
        is_open = certificates is None and isinstance(self._authenticator, NoAuthentication)
        self._hosts = (hosts or AllowedHosts()) if is_open else ANY_HOST
        self._lookups = CapacityLimiter(_MAX_LOOKUPS)

    def close(self) -> None:
        """Close the tenants' database. Call it once no call is in progress."""
        (self._certificates or self._authenticator).close()

    def check_host(self, host: str | None, origin: str | None) -> None:
        """Check the hosts that an HTTP request names; web pages know no key, so that servers with keys need no check.

        Raises:
            Misdirected: one of them is not allowed.
        """
        self._hosts.check(host, origin)

    async def admit(
        self, call: CallContext, scope: Scope, authorization: str | None, certificate: str | None = None
    ) -> PlmService:
        """Add the tenant to a call's context, and return the service, without blocking the event loop on the database.

        Known keys are served from a cache. Unknown keys share a small limiter, so a flood of bad keys cannot delay
        valid clients.

        Args:
            call: context of the call.
            scope: scope that the call needs.
            authorization: value of HTTP's `Authorization` header: `Bearer` and the key.
            certificate: common name in the client's certificate, if the server demands certificates.

        Raises:
            Unauthenticated: no tenant has this key, or this certificate.
            Forbidden: the tenant may not make this call.
            NotReady: the model is still loading, the server is stopping, or the database does not answer.
        """
        authenticator = self._authenticator if self._certificates is None else self._certificates.for_name(certificate)
        tenant = authenticator.cached(authorization)
        if tenant is None:
            tenant = await run_in_worker(lambda: authenticator.authenticate(authorization), self._lookups)
        if scope not in tenant.scopes:
            raise Forbidden(
                f"Your key does not allow this call, which needs the scope {scope}.",
                hint=f"It allows {', '.join(sorted(tenant.scopes)) or 'nothing'}. Ask the owner for more.",
            )
        service = self.state.ready()
        # Shares of the model are per tenant, and per client on a server without tenants.
        call.client = tenant.name or call.client
        call.tenant, call.disclosure, call.meter = tenant.name, tenant.disclosure, authenticator.meter(tenant)
        call.scopes = tenant.scopes if tenant.name else frozenset()
        return service
