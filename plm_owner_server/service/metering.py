"""Interface between the service and the quota ledger.

The service states the cost of a call. A `Meter` decides whether the tenant may spend it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from protocol.rate_limits import RateLimitStatus


@dataclass(frozen=True)
class CallCost:
    """Largest cost that a call can come to.

    Attributes:
        tokens: bound on the tokens that the model runs.
        head_rows: indices of the rows of the LM head in the answer; None if it has none.
        full_distribution: token ids of the text whose full distribution the answer has; None if it has none.
        model: digest of the model.
        vocab_size: V, the number of rows of the LM head.
    """

    tokens: int = 0
    head_rows: Sequence[int] | slice | None = None
    full_distribution: Sequence[int] | None = None
    model: str = ""
    vocab_size: int = 0

    @property
    def is_free(self) -> bool:
        """True if no quota limits the call."""
        return not self.tokens and self.head_rows is None and self.full_distribution is None


@dataclass
class Reservation:
    """Reserved cost of an admitted call.

    Attributes:
        tokens: tokens that will be charged. The service lowers it if the call cost less than its bound.
    """

    tokens: int


class Meter(Protocol):
    """Meters one call."""

    @property
    def left(self) -> Sequence[RateLimitStatus]:
        """Remaining quotas of the tenant, as of the last reservation or charge of this call."""

    def reserve(self, cost: CallCost) -> AbstractContextManager[Reservation]:
        """Reserve the cost while the body runs, and charge it when the body has ended. A body that fails costs nothing.

        Raises:
            QuotaExceeded: the tenant's quota is used up for now.
            BudgetExhausted: the tenant's budget is used up for good.
            NotReady: the database does not answer.
        """


class _Unmetered:
    left: Sequence[RateLimitStatus] = ()

    @contextmanager
    def reserve(self, cost: CallCost) -> Iterator[Reservation]:
        yield Reservation(cost.tokens)


UNMETERED: Meter = _Unmetered()
"""Meter of calls without a tenant: no quotas, no records."""
