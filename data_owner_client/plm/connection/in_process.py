"""A connection without a network, for a model and data on one machine."""

from __future__ import annotations

from data_owner_client.plm.connection.base import Observer, PlmApi
from protocol.rate_limits import RateLimitStatus


class InProcessConnection:
    """Connection to a PLM in this very process.

    Use it if the model and the data are on one machine: no server, no port, no key. All functions of
    `data_owner_client` work as over REST and gRPC. For example, with the server's own service:

        from data_owner_client import InProcessConnection, RemotePlm
        from plm_owner_server.cli.server_process import load_service
        from plm_owner_server.settings import ServerSettings

        service = load_service(ServerSettings(model="Qwen/Qwen3-0.6B"))
        plm = RemotePlm(InProcessConnection(service))
        response = plm.encode([[9707, 11, 1879]], from_position=[0])

    Args:
        calls: object that answers the calls, such as the server's `PlmService`. The connection does not close it.

    Attributes:
        observers: never called, because there are no attempts over a network.
        rate_limits: always empty, because there are no quotas.
    """

    def __init__(self, calls: PlmApi) -> None:
        self.observers: list[Observer] = []
        self.rate_limits: tuple[RateLimitStatus, ...] = ()
        self.model_card = calls.model_card
        self.tokenizer = calls.tokenizer
        self.lm_head = calls.lm_head
        self.encode = calls.encode
        self.decode = calls.decode
        self.distribution = calls.distribution

    def close(self) -> None:
        """Do nothing: the connection holds no resources."""
