"""The service while it is still coming: the port answers before the model is loaded."""

from __future__ import annotations

from plm_owner_server.service import PlmService
from protocol.errors import NotReady


class ServiceHolder:
    """The service, once its model is loaded."""

    def __init__(self, service: PlmService | None = None) -> None:
        self.service = service

    def ready(self) -> PlmService:
        """The service.

        Raises:
            NotReady: the model is still loading.
        """
        if self.service is None:
            raise NotReady("The model is still loading.", hint="Try again in a moment.", retry_after_s=2.0)
        return self.service
