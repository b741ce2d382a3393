"""The calls without a wire, for those who have model and data on one machine."""

from __future__ import annotations

from data_owner_client.plm.connection.base import Observer, PlmApi
from protocol.rate_limits import RateLimitStatus


class InProcessConnection:
    """Calls something that answers them in this very process, such as the server's own service.

    Args:
        calls: answers the calls.
    """

    def __init__(self, calls: PlmApi) -> None:
        self.observers: list[Observer] = []  # nothing is exchanged, so none is ever told
        self.rate_limits: tuple[RateLimitStatus, ...] = ()
        self.model_card = calls.model_card
        self.tokenizer = calls.tokenizer
        self.lm_head = calls.lm_head
        self.encode = calls.encode
        self.decode = calls.decode
        self.distribution = calls.distribution

    def close(self) -> None:
        """Nothing to let go of."""
