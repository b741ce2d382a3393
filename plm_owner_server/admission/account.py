"""A tenant's account as rows of the database, within one transaction."""

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
from plm_owner_server.tenants.quotas import quotas_of
from plm_owner_server.tenants.tables import FULL_DISTRIBUTIONS, HEAD_ROWS, MINUTES, RUNNING, TENANTS, USAGE

SEEN_WITHIN_S = 30.0
"""A call that is being answered is renewed by its server more often, in seconds; if it is not, that server has died."""


def is_alive(seconds: float) -> sa.ColumnElement[bool]:
    """Of a call that is being answered: whether its server was there about then, by whatever clock."""
    return RUNNING.c.seen_at.between(seconds - SEEN_WITHIN_S, seconds + SEEN_WITHIN_S)


def _sum(column: sa.ColumnElement[int], where: sa.ColumnElement[bool] | None = None) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(column if where is None else sa.case((where, column), else_=0)), 0)


# Made once, for every call asks them twice.
_NAME: sa.BindParameter[str] = sa.bindparam("tenant")
_DAY: sa.BindParameter[date] = sa.bindparam("day")
_MINUTE: sa.BindParameter[int] = sa.bindparam("minute")
_PUT_DOWN = sa.select(
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
    """One tenant's account, to which nobody else writes until the transaction is over.

    Args:
        connection: in a transaction that writes.
        tenant: its row.
        at: the moment of all that happens.
    """

    def __init__(self, connection: Connection, tenant: Row[Any], at: Instant) -> None:
        self._connection = connection
        self._tenant = tenant
        self._at = at
        self.quotas = quotas_of(tenant)

    @classmethod
    def open(cls, connection: Connection, tenant: str, at: Instant) -> Self:
        """The account of the tenant of this name."""
        # SQLite has locked everything already; others lock the tenant's row.
        return cls(connection, connection.execute(_TENANT, {"tenant": tenant}).one(), at)

    def used(self) -> QuotaUsage:
        """What was used up to now, with what is reserved."""
        given = {
            "tenant": self._tenant.name,
            "day": self._at.day,
            "minute": self._at.minute,
            "from": self._at.seconds - SEEN_WITHIN_S,
            "until": self._at.seconds + SEEN_WITHIN_S,
        }
        day, head_rows, full_distributions, minute = map(int, self._connection.execute(_PUT_DOWN, given).one())
        running, reserved_day, reserved_minute = map(int, self._connection.execute(_RESERVED, given).one())
        return QuotaUsage(minute + reserved_minute, day + reserved_day, running, head_rows, full_distributions)

    def begin(self, call_id: str, tokens: int) -> None:
        """A call is being answered from now on, for which so many tokens are reserved."""
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

    def end(self, call_id: str) -> None:
        """It is over."""
        self._connection.execute(sa.delete(RUNNING).where(RUNNING.c.id == call_id))

    def add(self, begun: Instant, **amounts: int) -> None:
        """Put a call down to the minute and the day in which it was let in.

        Args:
            begun: when that was.
            amounts: of the columns of the table of usage.
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
        """How many of a call's rows the tenant did not have yet.

        Args:
            cost: of the call.
            take: whether it has them from now on.
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
            given = np.packbits(has_V).tobytes()
            change = sa.insert(table).values(**key) if before is None else sa.update(table).where(this)
            self._connection.execute(change.values(given=given))
        return new

    def new_full_distributions(self, cost: CallCost, *, take: bool) -> int:
        """Whether a call's answer is a full distribution that the tenant did not have yet: 1 or 0.

        Args:
            cost: of the call.
            take: whether it has it from now on.
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
