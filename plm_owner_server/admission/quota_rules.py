"""Rules by which a call is admitted or refused, given a tenant's quotas and usage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property

from plm_owner_server.service.metering import CallCost
from plm_owner_server.tenants.quotas import Quotas
from protocol.errors import BudgetExhausted, PemaError, QuotaExceeded
from protocol.rate_limits import RateLimitStatus

_MINUTE_SECONDS = 60
_DAY_SECONDS = 86_400
# Another request of the tenant may have ended by then.
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class QuotaUsage:
    """A tenant's usage up to an instant, reservations of its calls in progress included.

    Attributes:
        tokens_this_minute: tokens used or reserved in the clock's current minute.
        tokens_today: tokens used or reserved in the current day of UTC.
        requests_in_progress: number of calls being answered, on all servers.
        head_rows: number of different LM head rows received, ever.
        full_distributions: number of different texts whose full distribution was received, ever.
    """

    tokens_this_minute: int = 0
    tokens_today: int = 0
    requests_in_progress: int = 0
    head_rows: int = 0
    full_distributions: int = 0


@dataclass(frozen=True)
class Instant:
    """A reading of the wall clock. Windows follow from it alone, so a clock that jumps is wrong for one window at most.

    Attributes:
        seconds: Unix time.
    """

    seconds: float

    @property
    def minute(self) -> int:
        """Number of the clock's minute, counted from 1970."""
        return int(self.seconds // _MINUTE_SECONDS)

    @cached_property
    def day(self) -> date:
        """The day in UTC."""
        return datetime.fromtimestamp(self.seconds, UTC).date()

    def seconds_left_in(self, window_s: int) -> int:
        """Whole seconds until the current window of this length, in seconds, is over; at least 1."""
        return max(1, math.ceil(window_s - self.seconds % window_s))


def rate_limit_error(quotas: Quotas, usage: QuotaUsage, cost: CallCost, at: Instant) -> PemaError | None:
    """The error for a call that is over a rate limit now; None if it is admitted.

    Usage below a limit admits one more call of any size, so no call is too large to be ever admitted.
    """
    if cost.tokens:
        for limit, tokens, window_s, name in (
            (quotas.tokens_per_day, usage.tokens_today, _DAY_SECONDS, "day"),
            (quotas.tokens_per_minute, usage.tokens_this_minute, _MINUTE_SECONDS, "minute"),
        ):
            if limit is not None and tokens >= limit:
                return _used_up(limit, name, at, window_s)
    if quotas.concurrent_requests is not None and usage.requests_in_progress >= quotas.concurrent_requests:
        return QuotaExceeded(
            f"{usage.requests_in_progress} of your requests are being answered, "
            f"and you may have {quotas.concurrent_requests}.",
            hint="Come back when one of them is done, or send fewer at once.",
            retry_after_s=_RETRY_SECONDS,
        )
    return None


def budget_error(quotas: Quotas, usage: QuotaUsage, *, head_rows: int, full_distributions: int) -> PemaError | None:
    """The error for new rows and distributions that exceed a lifetime budget; None if they do not.

    Args:
        quotas: the tenant's limits.
        usage: the tenant's usage so far.
        head_rows: number of new LM head rows in the answer.
        full_distributions: number of new full distributions in the answer.
    """
    for limit, before, new, name in (
        (quotas.head_rows, usage.head_rows, head_rows, "rows of the LM head"),
        (quotas.full_distributions, usage.full_distributions, full_distributions, "full distributions"),
    ):
        if limit is not None and new and before + new > limit:
            return BudgetExhausted(
                f"You may have {limit} different {name} in all, have {min(before, limit)}, and ask for {new} more.",
                hint="What you have you may ask for again. Ask the owner for more.",
            )
    return None


def rate_limits(quotas: Quotas, usage: QuotaUsage, at: Instant) -> tuple[RateLimitStatus, ...]:
    """The remainder of each quota that is set."""
    rows: tuple[tuple[str, int | None, int, str, int | None], ...] = (
        ("minute", quotas.tokens_per_minute, usage.tokens_this_minute, "tokens", _MINUTE_SECONDS),
        ("day", quotas.tokens_per_day, usage.tokens_today, "tokens", _DAY_SECONDS),
        ("concurrent", quotas.concurrent_requests, usage.requests_in_progress, "concurrent-requests", None),
        ("head-rows", quotas.head_rows, usage.head_rows, "head-rows", None),
        ("full-distributions", quotas.full_distributions, usage.full_distributions, "full-distributions", None),
    )
    return tuple(
        RateLimitStatus(
            name,
            quota,
            max(0, quota - amount),
            unit,
            window_s,
            None if window_s is None else at.seconds_left_in(window_s),
        )
        for name, quota, amount, unit, window_s in rows
        if quota is not None
    )


def _used_up(limit: int, name: str, at: Instant, window_s: int) -> PemaError:
    wait_s = at.seconds_left_in(window_s)
    when = datetime.fromtimestamp(at.seconds, UTC) + timedelta(seconds=wait_s)
    return QuotaExceeded(
        f"Your {limit} tokens of this {name} are used up.",
        hint=f"Come back in {wait_s} s, at {when:%H:%M} UTC, or ask the owner for more.",
        retry_after_s=float(wait_s),
    )
