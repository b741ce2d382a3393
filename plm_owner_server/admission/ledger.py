"""Ledger of tenants' usage: calls are admitted, and recorded when they are answered, over all servers of a database.

While a call is answered, the most that it can cost is reserved, and other calls see it as used. The true cost is
recorded when the answer is ready. A call that fails, or whose server dies, leaves only its reservation, which expires.
Lifetime budgets are charged before the answer is sent, so a cancelled call cannot obtain rows without paying for them.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from plm_owner_server.admission.account import TenantAccount
from plm_owner_server.admission.quota_rules import Instant, QuotaUsage, budget_error, rate_limit_error, rate_limits
from plm_owner_server.admission.reservations import ReservationHeartbeat
from plm_owner_server.service.metering import CallCost, Meter, Reservation
from plm_owner_server.tenants.database import Database
from protocol.errors import NotReady, PemaError
from protocol.rate_limits import RateLimitStatus

log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0


class Ledger:
    """Admits and records the calls of tenants. Thread-safe; several processes may share a database.

    Args:
        database: the database with the tenants.
        clock: returns Unix time. It may jump.

    Attributes:
        heartbeat: renews the reservations of this server's calls.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.heartbeat = ReservationHeartbeat(database, clock)
        self._database = database
        self._clock = clock

    def meter(self, tenant: str) -> Meter:
        """A meter for one call of a tenant."""
        return _Meter(self, tenant)

    @contextmanager
    def open_account(self, tenant: str) -> Iterator[tuple[TenantAccount, Instant]]:
        """A tenant's account, open for one transaction, and the time of the transaction.

        Raises:
            NotReady: the database does not answer, so that the call cannot be counted.
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
                retry_after_s=_RETRY_SECONDS,
            ) from None


@dataclass(frozen=True)
class _Call:
    """A call that was admitted."""

    cost: CallCost
    begun: Instant
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class _Meter:
    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant
        self.left: Sequence[RateLimitStatus] = ()

    @contextmanager
    def reserve(self, cost: CallCost) -> Iterator[Reservation]:
        call, reservation = self._admit(cost), Reservation(cost.tokens)
        try:
            yield reservation
        except BaseException:
            self._release(call)
            raise
        self._settle(call, reservation)

    def _admit(self, cost: CallCost) -> _Call | None:
        """Reserve the most that a call can cost, or refuse it; None for a call that is free."""
        if cost.is_free:
            return None
        with self._ledger.open_account(self._tenant) as (account, at):
            call, usage = _Call(cost, at), account.usage()
            refusal = rate_limit_error(account.quotas, usage, cost, at) or _budget_error(account, usage, cost)
            if refusal is None:
                account.reserve(call.id, cost.tokens)
            else:
                account.record(at, refused=1)
                self.left = rate_limits(account.quotas, usage, at)
        if refusal is not None:
            raise refusal
        self._ledger.heartbeat.add(call.id)
        return call

    def _release(self, call: _Call | None) -> None:
        if call is None:
            return
        self._ledger.heartbeat.remove(call.id)
        with suppress(NotReady), self._ledger.open_account(self._tenant) as (account, at):  # else it soon expires
            account.release(call.id)
            self.left = rate_limits(account.quotas, account.usage(), at)

    def _settle(self, call: _Call | None, reservation: Reservation) -> None:
        if call is not None:
            self._ledger.heartbeat.remove(call.id)
        with self._ledger.open_account(self._tenant) as (account, at):
            refusal: PemaError | None = None
            if call is None:
                account.record(at, requests=1)
            else:
                account.release(call.id)
                refusal = _budget_error(account, account.usage(), call.cost)  # other calls may have spent it
                if refusal is None:
                    head_rows = account.new_head_rows(call.cost, take=True)
                    full_distributions = account.new_full_distributions(call.cost, take=True)
                    account.record(
                        call.begun,
                        requests=1,
                        tokens=reservation.tokens,
                        head_rows=head_rows,
                        full_distributions=full_distributions,
                    )
                else:
                    account.record(call.begun, refused=1)
            self.left = rate_limits(account.quotas, account.usage(), at)
        if refusal is not None:
            raise refusal


def _budget_error(account: TenantAccount, usage: QuotaUsage, cost: CallCost) -> PemaError | None:
    """The error for a call whose rows or distribution exceed a lifetime budget; None if they do not."""
    return budget_error(
        account.quotas,
        usage,
        head_rows=account.new_head_rows(cost, take=False),
        full_distributions=account.new_full_distributions(cost, take=False),
    )
