"""Rules that decide whether a tenant may spend what a call costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property

from plm_owner_server.service.metering import CallCost
from plm_owner_server.tenants.quotas import Quotas
from protocol.errors import BudgetExhausted, PemaError, QuotaExceeded
from protocol.rate_limits import RateLimitStatus

_MINUTE_S = 60


_DAY_S = 86_400


# How soon another request may have ended.
_NEXT_PLACE_S = 1.0


@dataclass(frozen=True)
class QuotaUsage:
    """What a tenant has used up to a moment, and what is reserved for its calls that are being answered.

    Attributes:
        minute_tokens: in this minute.
        day_tokens: on this day.
        running: calls that are being answered.
        head_rows: ever.
        full_distributions: ever.
    """

    minute_tokens: int = 0
    day_tokens: int = 0
    running: int = 0
    head_rows: int = 0
    full_distributions: int = 0


@dataclass(frozen=True)
class Instant:
    """A reading of the wall clock, which may jump: every window is found from it alone, so no jump outlasts one.

    Attributes:
        seconds: from 1970.
    """

    seconds: float

    @property
    def minute(self) -> int:
        """The clock's minute, counted from 1970."""
        return int(self.seconds // _MINUTE_S)

    @cached_property
    def day(self) -> date:
        """The day in UTC."""
        return datetime.fromtimestamp(self.seconds, UTC).date()

    def left_of(self, window_s: int) -> int:
        """Whole seconds after which a window of this length is over."""
        return max(1, math.ceil(window_s - self.seconds % window_s))


def rate_limit_error(quotas: Quotas, used: QuotaUsage, cost: CallCost, at: Instant) -> PemaError | None:
    """Why a call cannot be let in now; None if it can.

    What is below its limit takes one more call whole, so that none is too large to be ever let in.
    """
    if cost.tokens:
        for limit, tokens, window_s, name in (
            (quotas.tokens_per_day, used.day_tokens, _DAY_S, "day"),
            (quotas.tokens_per_minute, used.minute_tokens, _MINUTE_S, "minute"),
        ):
            if limit is not None and tokens >= limit:
                return _used_up(limit, name, at, window_s)
    if quotas.concurrent_requests is not None and used.running >= quotas.concurrent_requests:
        return QuotaExceeded(
            f"{used.running} of your requests are being answered, and you may have {quotas.concurrent_requests}.",
            hint="Come back when one of them is done, or send fewer at once.",
            retry_after_s=_NEXT_PLACE_S,
        )
    return None


def budget_error(quotas: Quotas, used: QuotaUsage, *, head_rows: int, full_distributions: int) -> PemaError | None:
    """Why so many new rows and distributions cannot be given out; None if they can."""
    for limit, before, more, name in (
        (quotas.head_rows, used.head_rows, head_rows, "rows of the LM head"),
        (quotas.full_distributions, used.full_distributions, full_distributions, "full distributions"),
    ):
        if limit is not None and more and before + more > limit:
            return BudgetExhausted(
                f"You may have {limit} different {name} in all, have {min(before, limit)}, and ask for {more} more.",
                hint="What you have you may ask for again. Ask the owner for more.",
            )
    return None


def allowances(quotas: Quotas, used: QuotaUsage, at: Instant) -> tuple[RateLimitStatus, ...]:
    """What is left of each quota that there is."""
    rows: tuple[tuple[str, int | None, int, str, int | None], ...] = (
        ("minute", quotas.tokens_per_minute, used.minute_tokens, "tokens", _MINUTE_S),
        ("day", quotas.tokens_per_day, used.day_tokens, "tokens", _DAY_S),
        ("concurrent", quotas.concurrent_requests, used.running, "concurrent-requests", None),
        ("head-rows", quotas.head_rows, used.head_rows, "head-rows", None),
        ("full-distributions", quotas.full_distributions, used.full_distributions, "full-distributions", None),
    )
    return tuple(
        RateLimitStatus(
            name, quota, max(0, quota - amount), unit, window_s, None if window_s is None else at.left_of(window_s)
        )
        for name, quota, amount, unit, window_s in rows
        if quota is not None
    )


def _used_up(limit: int, name: str, at: Instant, window_s: int) -> PemaError:
    wait_s = at.left_of(window_s)
    when = datetime.fromtimestamp(at.seconds, UTC) + timedelta(seconds=wait_s)
    return QuotaExceeded(
        f"Your {limit} tokens of this {name} are used up.",
        hint=f"Come back in {wait_s} s, at {when:%H:%M} UTC, or ask the owner for more.",
        retry_after_s=float(wait_s),
    )
