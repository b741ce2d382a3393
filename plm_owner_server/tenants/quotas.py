"""Quotas of a tenant, as its row in the database holds them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy.engine import Row


@dataclass(frozen=True)
class Quotas:
    """What a tenant may use. None is without a limit, 0 is nothing at all.

    Attributes:
        tokens_per_minute: in each of the clock's minutes.
        tokens_per_day: in each day of UTC.
        concurrent_requests: at the same time, over all servers.
        head_rows: different rows of LM heads, ever.
        full_distributions: texts whose full distribution it may have, ever.
    """

    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent_requests: int | None = None
    head_rows: int | None = None
    full_distributions: int | None = None


def quotas_of(tenant: Row[Any]) -> Quotas:
    """The quotas in a tenant's row."""
    return Quotas(**{field.name: getattr(tenant, field.name) for field in fields(Quotas)})
