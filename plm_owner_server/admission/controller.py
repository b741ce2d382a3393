"""What stands before the service: who may call, and whether there is a model to answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from anyio import CapacityLimiter

from plm_owner_server.admission.authentication import Authenticator, NoAuthentication
from plm_owner_server.admission.client_certificates import CertificateAuthenticator
from plm_owner_server.operations.call_log import CallRecorder
from plm_owner_server.service.metering import Meter
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.service.worker_threads import run_in_worker
from plm_owner_server.tenants.store import Scope, Tenant
from protocol.errors import Forbidden, NotReady

# Keys at a time.
_ASKED_ABOUT = 8


def shutting_down_error() -> NotReady:
    """What calls are told while the server stops."""
    return NotReady(
        "The server is stopping.", hint="Try again in a moment: another one takes its place.", retry_after_s=5.0
    )


@dataclass(frozen=True)
class Admission:
    """A caller who may make a call.

    Attributes:
        service: answers it.
        tenant: whose call it is.
        meter: that it is put down on.
    """

    service: PlmService
    tenant: Tenant
    meter: Meter

    def caller(self, client: str = "") -> CallContext:
        """The call's caller; tenants share the model among them, and clients where there are no tenants."""
        return CallContext(self.tenant.name or client, self.tenant.name, self.tenant.disclosure, self.meter)


class ServiceHolder:
    """The service, while its model is loaded and the server is not stopping.

    Args:
        service: may come later.
        access: tells who a caller is; everybody may call unless given.
        certified: tells it by the callers' certificates, instead.

    Attributes:
        service: None while the model is loaded, or loaded again.
        accounts: what every call is put down to.
        calls: number of those that are worked on, until their answers are on their way.
    """

    def __init__(
        self,
        service: PlmService | None = None,
        access: Authenticator | None = None,
        certified: CertificateAuthenticator | None = None,
    ) -> None:
        self.service = service
        self.accounts = CallRecorder()
        self.calls = 0
        self._stopping = False
        self._certified = certified
        self._access = access or NoAuthentication()
        self._asking = CapacityLimiter(_ASKED_ABOUT)

    def ready(self) -> PlmService:
        """The service.

        Raises:
            NotReady: the model is loading, or the server is stopping.
        """
        if self._stopping:
            raise shutting_down_error()
        if self.service is None:
            raise NotReady("The model is still loading.", hint="Try again in a moment.", retry_after_s=2.0)
        return self.service

    @property
    def is_ready(self) -> bool:
        """Whether calls are answered."""
        return self.service is not None and not self._stopping

    def stop(self) -> None:
        """Turn away new calls from now on."""
        self._stopping = True

    def close(self) -> None:
        """Let go of what callers are looked up in, once there are no calls any more."""
        (self._certified or self._access).close()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count a call that is worked on; in the event loop's thread."""
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    async def admit(self, authorization: str | None, scope: Scope, certificate: str | None = None) -> Admission:
        """Let a caller make a call, without keeping the event loop waiting for a database.

        Who has no key cannot keep those waiting who have one: they are known, and few are asked about at a time.

        Args:
            authorization: `Bearer` and the key, as in HTTP's header of the name.
            scope: that the call needs.
            certificate: common name in the caller's, where the server demands one.

        Raises:
            Unauthenticated: it is nobody's key, or nobody's certificate.
            Forbidden: its tenant may not make this call.
            NotReady: the model is still loading, or nobody can tell whose key it is.
        """
        access = self._access if self._certified is None else self._certified.of(certificate)
        tenant = access.recall(authorization)
        if tenant is None:
            tenant = await run_in_worker(lambda: access.identify(authorization), self._asking)
        if scope not in tenant.scopes:
            raise Forbidden(
                f"Your key does not allow this call, which needs the scope {scope}.",
                hint=f"It allows {', '.join(sorted(tenant.scopes)) or 'nothing'}. Ask the owner for more.",
            )
        return Admission(self.ready(), tenant, access.meter(tenant))
