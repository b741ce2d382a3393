"""What a call costs. The service says how much, and a meter for each call, of whoever keeps the books, whether."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from protocol.rate_limits import RateLimitStatus


@dataclass(frozen=True)
class CallCost:
    """What a call may come to cost.

    Attributes:
        tokens: that the model works on; the most that it can be.
        head_rows: rows of the LM head that the answer has.
        full_distribution: the text whose distribution the answer has, if that is a full one.
        model: digest of the model.
        vocab_size: V, its rows in all.
    """

    tokens: int = 0
    head_rows: Sequence[int] | slice | None = None
    full_distribution: Sequence[int] | None = None
    model: str = ""
    vocab_size: int = 0

    @property
    def is_free(self) -> bool:
        """Whether no quota is asked about it."""
        return not self.tokens and self.head_rows is None and self.full_distribution is None


@dataclass
class Reservation:
    """A call that was let in.

    Attributes:
        tokens: that it will have cost; the service lowers it if it was less than it might have been.
    """

    tokens: int


class Meter(Protocol):
    """Measures one call."""

    @property
    def left(self) -> Sequence[RateLimitStatus]:
        """What is left of the quotas, as far as the call has been put down already."""

    def charging(self, cost: CallCost) -> AbstractContextManager[Reservation]:
        """Let the call in, and put it down when the work within is done; work that fails costs nothing.

        Raises:
            QuotaExceeded: no more now.
            BudgetSpent: no more ever.
            NotReady: nobody can tell now.
        """


class _Unmetered:
    left: Sequence[RateLimitStatus] = ()

    @contextmanager
    def charging(self, cost: CallCost) -> Iterator[Reservation]:
        yield Reservation(cost.tokens)


UNMETERED: Meter = _Unmetered()
"""For those who have no quotas and of whom nobody keeps count."""
