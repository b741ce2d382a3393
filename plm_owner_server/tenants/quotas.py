"""Quotas of a tenant."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from sqlalchemy.engine import Row


@dataclass(frozen=True)
class Quotas:
    """Limits of a tenant. None is no limit, 0 allows nothing.

    Attributes:
        tokens_per_minute: tokens in each of the clock's minutes.
        tokens_per_day: tokens in each day of UTC.
        concurrent_requests: requests at the same time, on all servers together.
        head_rows: different rows of LM heads, ever.
        full_distributions: different texts whose full distribution it may get, ever.
    """

    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent_requests: int | None = None
    head_rows: int | None = None
    full_distributions: int | None = None

    @classmethod
    def from_row(cls, tenant: Row[Any]) -> Self:
        """The quotas in a tenant's row of the database."""
        return cls(**{field.name: getattr(tenant, field.name) for field in fields(cls)})
