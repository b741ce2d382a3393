"""Who has used how much: calls are let in, and put down when they are answered, over all servers of one database.

While a call is answered, what it may come to cost is reserved: other calls see it as used. It is put down when the
answer is there; a call that fails, or whose server dies, leaves nothing but the reservation, which then counts no more.
What lifetime budgets are for is given out only once it is put down, so that no call that is broken off takes it along.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from plm_owner_server.admission.account import TenantAccount
from plm_owner_server.admission.quota_rules import Instant, QuotaUsage, allowances, budget_error, rate_limit_error
from plm_owner_server.admission.reservations import ReservationHeartbeat
from plm_owner_server.service.metering import CallCost, Meter, Reservation
from plm_owner_server.tenants.database import Database
from protocol.errors import NotReady, PemaError
from protocol.rate_limits import RateLimitStatus

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 2.0


class Ledger:
    """Keeps the accounts of tenants. Thread-safe; several processes may share a database.

    Args:
        database: with the tenants.
        clock: seconds from 1970. It may jump.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.running = ReservationHeartbeat(database, clock)
        self._database = database
        self._clock = clock

    def meter(self, tenant: str) -> Meter:
        """What one call of a tenant's is put down on."""
        return _Meter(self, tenant)

    @contextmanager
    def books(self, tenant: str) -> Iterator[tuple[TenantAccount, Instant]]:
        """A tenant's account, open for one transaction, and its moment.

        Raises:
            NotReady: the database does not answer: what cannot be counted is not answered.
        """
        try:
            with self._database.writing() as connection:
                at = Instant(self._clock())
                yield TenantAccount.open(connection, tenant, at), at
        except PemaError as error:
            log.warning("%s", error)
            raise NotReady(
                "The server cannot count at the moment what you use.",
                hint="Try again in a moment.",
                retry_after_s=_RETRY_AFTER_S,
            ) from None


@dataclass(frozen=True)
class _Call:
    """A call that was let in."""

    cost: CallCost
    begun: Instant
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class _Meter:
    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant
        self.left: Sequence[RateLimitStatus] = ()

    @contextmanager
    def charging(self, cost: CallCost) -> Iterator[Reservation]:
        call, charge = self._let_in(cost), Reservation(cost.tokens)
        try:
            yield charge
        except BaseException:
            self._give_back(call)
            raise
        self._put_down(call, charge)

    def _let_in(self, cost: CallCost) -> _Call | None:
        """Reserve what a call may come to cost, or refuse it; there is no need to for one that costs nothing."""
        if cost.is_free:
            return None
        with self._ledger.books(self._tenant) as (books, at):
            call, used = _Call(cost, at), books.used()
            refused = rate_limit_error(books.quotas, used, cost, at) or _spent(books, used, cost)
            if refused is None:
                books.begin(call.id, cost.tokens)
            else:
                books.add(at, refused=1)
                self.left = allowances(books.quotas, used, at)
        if refused is not None:
            raise refused
        self._ledger.running.add(call.id)
        return call

    def _give_back(self, call: _Call | None) -> None:
        if call is None:
            return
        self._ledger.running.remove(call.id)
        with suppress(NotReady), self._ledger.books(self._tenant) as (books, at):  # else it is soon taken for dead
            books.end(call.id)
            self.left = allowances(books.quotas, books.used(), at)

    def _put_down(self, call: _Call | None, charge: Reservation) -> None:
        if call is not None:
            self._ledger.running.remove(call.id)
        with self._ledger.books(self._tenant) as (books, at):
            refused: PemaError | None = None
            if call is None:
                books.add(at, requests=1)
            else:
                books.end(call.id)
                refused = _spent(books, books.used(), call.cost)  # others may have taken what was there
                if refused is None:
                    head_rows = books.new_head_rows(call.cost, take=True)
                    full_distributions = books.new_full_distributions(call.cost, take=True)
                    books.add(
                        call.begun,
                        requests=1,
                        tokens=charge.tokens,
                        head_rows=head_rows,
                        full_distributions=full_distributions,
                    )
                else:
                    books.add(call.begun, refused=1)
            self.left = allowances(books.quotas, books.used(), at)
        if refused is not None:
            raise refused


def _spent(books: TenantAccount, used: QuotaUsage, cost: CallCost) -> PemaError | None:
    """Why a call's rows and distribution cannot be given out; None if they can."""
    return budget_error(
        books.quotas,
        used,
        head_rows=books.new_head_rows(cost, take=False),
        full_distributions=books.new_full_distributions(cost, take=False),
    )
