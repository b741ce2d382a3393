"""Usage of tenants by day, as a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from datetime import date

import sqlalchemy as sa

from plm_owner_server.tenants.database import Database
from plm_owner_server.tenants.tables import USAGE


@dataclass(frozen=True)
class DayOfUsage:
    """Usage of one tenant on one day.

    Attributes:
        tenant: the tenant's name.
        day: the day in UTC.
        requests: number of requests answered.
        refused: number of requests refused because of quotas.
        tokens: number of tokens that the model processed.
        head_rows: number of LM head rows that the tenant had not received before.
        full_distributions: number of texts whose full distribution it had not received before.
    """

    tenant: str
    day: date
    requests: int
    refused: int
    tokens: int
    head_rows: int
    full_distributions: int


_COLUMNS = [field.name for field in fields(DayOfUsage)]
_LINE = "{:<24} {:<10} {:>10} {:>10} {:>15} {:>10} {:>18}"


def read_usage(database: Database, *, since: date, tenant: str | None = None) -> list[DayOfUsage]:
    """Usage on all days with calls, ordered by tenant and day.

    Args:
        database: the database with the tenants.
        since: the first day.
        tenant: name of the only tenant to read; None reads all.
    """
    query = sa.select(*(USAGE.c[name] for name in _COLUMNS)).where(USAGE.c.day >= since)
    if tenant is not None:
        query = query.where(USAGE.c.tenant == tenant)
    with database.reading() as connection:
        return [DayOfUsage(*row) for row in connection.execute(query.order_by(USAGE.c.tenant, USAGE.c.day))]


def as_table(days: Sequence[DayOfUsage]) -> str:
    """Usage as a table for people."""
    rows = [[name.upper().replace("_", " ") for name in _COLUMNS]]
    rows += [[day.tenant, str(day.day), *(f"{number:,}" for number in astuple(day)[2:])] for day in days]
    return "".join(_LINE.format(*row) + "\n" for row in rows)


def as_csv(days: Sequence[DayOfUsage]) -> str:
    """Usage as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(astuple(day) for day in days)
    return text.getvalue()


def as_json(days: Sequence[DayOfUsage]) -> str:
    """Usage as a JSON array."""
    return json.dumps([asdict(day) for day in days], default=str, indent=1) + "\n"
