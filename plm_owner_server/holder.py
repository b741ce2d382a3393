"""What stands before the service: the key, and the time until the model is loaded, when the port answers already."""

from __future__ import annotations

import hmac

from plm_owner_server.service import PlmService
from protocol.errors import NotReady, Unauthenticated


class ServiceHolder:
    """The service, once its model is loaded.

    Args:
        service: may come later.
        api_key: what clients must show; None lets everybody in.
    """

    def __init__(self, service: PlmService | None = None, *, api_key: str | None = None) -> None:
        self.service = service
        self._authorization = None if api_key is None else f"Bearer {api_key}"

    def ready(self) -> PlmService:
        """The service.

        Raises:
            NotReady: the model is still loading.
        """
        if self.service is None:
            raise NotReady("The model is still loading.", hint="Try again in a moment.", retry_after_s=2.0)
        return self.service

    def admit(self, authorization: str | None) -> PlmService:
        """The service, for a caller who showed this.

        Args:
            authorization: `Bearer` and the key, as in HTTP's header of the name.

        Raises:
            Unauthenticated: it is not the key.
            NotReady: the model is still loading.
        """
        # In constant time, or an attacker could find the key letter by letter.
        if self._authorization is not None and not hmac.compare_digest(
            self._authorization.encode(), (authorization or "").encode()
        ):
            raise Unauthenticated(
                "The server asks for a key, and " + ("got another one." if authorization else "got none."),
                hint="Set PEMA_API_KEY to the key that the owner gave you, or say --api-key.",
            )
        return self.ready()
