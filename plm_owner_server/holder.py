"""What stands before the service: who may call, and the time until the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from anyio import CapacityLimiter

from plm_owner_server.scheduler import Caller
from plm_owner_server.service import PlmService
from plm_owner_server.tenants import Access, Anyone, Scope, Tenant
from plm_owner_server.threads import in_worker
from protocol.errors import Forbidden, NotReady

# Keys at a time, at each transport.
_ASKED_ABOUT = 8


@dataclass(frozen=True)
class Admission:
    """A caller who may make a call.

    Attributes:
        service: answers it.
        tenant: whose call it is.
    """

    service: PlmService
    tenant: Tenant

    def caller(self, client: str) -> Caller:
        """The call's caller; tenants share the model among them, and clients where there are no tenants."""
        return Caller(self.tenant.name or client, self.tenant.name)


class ServiceHolder:
    """The service, once its model is loaded.

    Args:
        service: may come later.
        access: tells who a caller is; everybody may call unless given.
    """

    def __init__(self, service: PlmService | None = None, access: Access | None = None) -> None:
        self.service = service
        self._access = access or Anyone()

    def ready(self) -> PlmService:
        """The service.

        Raises:
            NotReady: the model is still loading.
        """
        if self.service is None:
            raise NotReady("The model is still loading.", hint="Try again in a moment.", retry_after_s=2.0)
        return self.service

    def recall(self, authorization: str | None, scope: Scope) -> Admission | None:
        """Let a caller in who is known; None for one that `admit` has to ask about. The rest: see there."""
        tenant = self._access.recall(authorization)
        return None if tenant is None else self._admission(tenant, scope)

    def admit(self, authorization: str | None, scope: Scope) -> Admission:
        """Let a caller make a call. It may ask a database who that is, so it is for a thread of its own.

        Args:
            authorization: `Bearer` and the key, as in HTTP's header of the name.
            scope: that the call needs.

        Raises:
            Unauthenticated: it is nobody's key.
            Forbidden: its tenant may not make this call.
            NotReady: the model is still loading, or nobody can tell whose key it is.
        """
        return self._admission(self._access.identify(authorization), scope)

    def _admission(self, tenant: Tenant, scope: Scope) -> Admission:
        if scope not in tenant.scopes:
            raise Forbidden(
                f"Your key does not allow this call, which needs the scope {scope}.",
                hint=f"It allows {', '.join(sorted(tenant.scopes)) or 'nothing'}. Ask the owner for more.",
            )
        return Admission(self.ready(), tenant)


class Door:
    """Where an event loop lets callers in, without waiting for a database itself.

    Who has no key cannot keep those waiting who have one: they are known, and so few are asked about at a time.

    Args:
        holder: knows them.
    """

    def __init__(self, holder: ServiceHolder) -> None:
        self._holder = holder
        self._limiter = CapacityLimiter(_ASKED_ABOUT)

    async def admit(self, authorization: str | None, scope: Scope) -> Admission:
        """As `ServiceHolder.admit`."""
        if (known := self._holder.recall(authorization, scope)) is not None:
            return known
        return await in_worker(lambda: self._holder.admit(authorization, scope), self._limiter)
