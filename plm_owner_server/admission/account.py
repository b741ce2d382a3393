"""A tenant's quotas and usage in the database, within one transaction."""

from __future__ import annotations

import hashlib
import hmac
from datetime import date
from typing import Any, Self

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from plm_owner_server.admission.quota_rules import Instant, QuotaUsage
from plm_owner_server.service.metering import CallCost
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.tables import FULL_DISTRIBUTIONS, HEAD_ROWS, MINUTES, RUNNING, TENANTS, USAGE

SEEN_WITHIN_SECONDS = 30.0
"""Age after which a reservation no longer counts. Servers renew theirs more often, unless they have died."""


def is_alive(seconds: float) -> sa.ColumnElement[bool]:
    """Condition on `RUNNING`: the reservation was renewed within `SEEN_WITHIN_SECONDS` of this time, before or after.

    Args:
        seconds: Unix time. Later times are allowed because the servers' clocks may differ.
    """
    return RUNNING.c.seen_at.between(seconds - SEEN_WITHIN_SECONDS, seconds + SEEN_WITHIN_SECONDS)


def _sum(column: sa.ColumnElement[int], where: sa.ColumnElement[bool] | None = None) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(column if where is None else sa.case((where, column), else_=0)), 0)


# Built once: every call runs these statements twice.
_NAME: sa.BindParameter[str] = sa.bindparam("tenant")
_DAY: sa.BindParameter[date] = sa.bindparam("day")
_MINUTE: sa.BindParameter[int] = sa.bindparam("minute")
_RECORDED = sa.select(
    _sum(USAGE.c.tokens, USAGE.c.day == _DAY),
    _sum(USAGE.c.head_rows),
    _sum(USAGE.c.full_distributions),
    sa.select(_sum(MINUTES.c.tokens)).where(MINUTES.c.tenant == _NAME, MINUTES.c.minute == _MINUTE).scalar_subquery(),
).where(USAGE.c.tenant == _NAME)
_RESERVED = sa.select(
    sa.func.count(),
    _sum(RUNNING.c.tokens, RUNNING.c.day == _DAY),
    _sum(RUNNING.c.tokens, RUNNING.c.minute == _MINUTE),
).where(RUNNING.c.tenant == _NAME, RUNNING.c.seen_at.between(sa.bindparam("from"), sa.bindparam("until")))
_TENANT = sa.select(TENANTS).where(TENANTS.c.name == _NAME).with_for_update()


class TenantAccount:
    """One tenant's account. No other transaction writes to it until this one is over.

    Args:
        connection: in a transaction that writes.
        tenant: the tenant's row of `TENANTS`.
        at: the time at which everything in this transaction happens.

    Attributes:
        quotas: the tenant's limits.
    """

    def __init__(self, connection: Connection, tenant: Row[Any], at: Instant) -> None:
        self._connection = connection
        self._tenant = tenant
        self._at = at
        self.quotas = Quotas.from_row(tenant)

    @classmethod
    def open(cls, connection: Connection, tenant: str, at: Instant) -> Self:
        """Lock and return the account of the tenant of this name."""
        # SQLite has locked everything already; other databases lock the tenant's row.
        return cls(connection, connection.execute(_TENANT, {"tenant": tenant}).one(), at)

    def usage(self) -> QuotaUsage:
        """Usage recorded so far, plus the reservations of calls in progress."""
        parameters = {
            "tenant": self._tenant.name,
            "day": self._at.day,
            "minute": self._at.minute,
            "from": self._at.seconds - SEEN_WITHIN_SECONDS,
            "until": self._at.seconds + SEEN_WITHIN_SECONDS,
        }
        day, head_rows, full_distributions, minute = map(int, self._connection.execute(_RECORDED, parameters).one())
        in_progress, reserved_day, reserved_minute = map(int, self._connection.execute(_RESERVED, parameters).one())
        return QuotaUsage(minute + reserved_minute, day + reserved_day, in_progress, head_rows, full_distributions)

    def reserve(self, call_id: str, tokens: int) -> None:
        """Reserve tokens for a call that begins now."""
        self._connection.execute(
            sa.insert(RUNNING).values(
                id=call_id,
                tenant=self._tenant.name,
                seen_at=self._at.seconds,
                day=self._at.day,
                minute=self._at.minute,
                tokens=tokens,
            )
        )

    def release(self, call_id: str) -> None:
        """Delete the reservation of a call that is over."""
        self._connection.execute(sa.delete(RUNNING).where(RUNNING.c.id == call_id))

    def record(self, begun: Instant, **amounts: int) -> None:
        """Record a call's usage in the minute and the day in which it was admitted.

        Args:
            begun: the time of admission.
            amounts: by column of `USAGE`.
        """
        name = self._tenant.name
        self._add(USAGE, {"tenant": name, "day": begun.day}, amounts)
        if tokens := amounts.get("tokens"):
            self._add(MINUTES, {"tenant": name, "minute": begun.minute}, {"tokens": tokens})

    def _add(self, table: sa.Table, key: dict[str, Any], amounts: dict[str, int]) -> None:
        this = sa.and_(*(table.c[column] == value for column, value in key.items()))
        more = {column: table.c[column] + amount for column, amount in amounts.items()}
        if self._connection.execute(sa.update(table).where(this).values(more)).rowcount == 0:
            self._connection.execute(sa.insert(table).values(key | amounts))

    def new_head_rows(self, cost: CallCost, *, take: bool) -> int:
        """Number of a call's head rows that the tenant has never had.

        Args:
            cost: the call's cost.
            take: record them as had from now on.
        """
        if cost.head_rows is None:
            return 0
        table, key = HEAD_ROWS, {"tenant": self._tenant.name, "model": cost.model}
        this = sa.and_(table.c.tenant == key["tenant"], table.c.model == key["model"])
        before = self._connection.scalar(sa.select(table.c.given).where(this))
        had_V = np.zeros(cost.vocab_size, bool) if before is None else _bits(before, cost.vocab_size)
        has_V = had_V.copy()
        has_V[cost.head_rows] = True
        new = int(np.count_nonzero(has_V)) - int(np.count_nonzero(had_V))
        if take and new:
            packed = np.packbits(has_V).tobytes()
            change = sa.insert(table).values(**key) if before is None else sa.update(table).where(this)
            self._connection.execute(change.values(given=packed))
        return new

    def new_full_distributions(self, cost: CallCost, *, take: bool) -> int:
        """Number (1 or 0) of full distributions in a call's answer that the tenant has never had.

        Args:
            cost: the call's cost.
            take: record it as had from now on.
        """
        if cost.full_distribution is None:
            return 0
        table, text = FULL_DISTRIBUTIONS, np.asarray(cost.full_distribution, "<i4").tobytes()
        text_hash = hmac.digest(self._tenant.text_secret, cost.model.encode() + b"\0" + text, hashlib.sha256)
        key = {"tenant": self._tenant.name, "text_hash": text_hash}
        this = sa.and_(table.c.tenant == key["tenant"], table.c.text_hash == text_hash)
        if self._connection.scalar(sa.select(sa.func.count()).select_from(table).where(this)):
            return 0
        if take:
            self._connection.execute(sa.insert(table).values(key))
        return 1


def _bits(packed: bytes, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).view(bool)
