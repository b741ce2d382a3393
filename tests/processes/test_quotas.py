"""Quotas of several processes that write to one store at the same time."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import sqlalchemy as sa

from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.tenants.tables import RUNNING
from plm_owner_server.tenants.usage import read_usage
from tests import support

pytestmark = pytest.mark.unguarded("no server")

_WRITER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from plm_owner_server.cli import main
from plm_owner_server.service.metering import CallCost
from plm_owner_server.tenants.database import Database
from plm_owner_server.admission.ledger import Ledger

url, first = sys.argv[1], int(sys.argv[2])
ledger = Ledger(Database(url))

def call(number):
    try:
        with ledger.meter("acme").reserve(CallCost(number, [number, 7], model="a" * 64, vocab_size=1000)) as charge:
            if number % 5 == 0:
                raise ZeroDivisionError
            charge.tokens -= 1
    except ZeroDivisionError:
        pass

with ThreadPoolExecutor(4) as pool:
    list(pool.map(call, range(first, first + 100)))
"""


def test_servers_that_write_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    url = support.empty_database(tmp_path)
    store = TenantStore(url)
    store.add("acme", quotas=Quotas(tokens_per_minute=10**6, head_rows=1000))
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", _WRITER, url, str(first)]) for first in (101, 151)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    answered = [number for first in (101, 151) for number in range(first, first + 100) if number % 5]
    days = [
        (day.requests, day.refused, day.tokens, day.head_rows, day.full_distributions)
        for day in read_usage(store.database, since=date.min, tenant="acme")
    ]
    total = [sum(column) for column in zip(*days, strict=True)]
    assert total == [len(answered), 0, sum(answered) - len(answered), len({*answered, 7}), 0]
    with store.database.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(RUNNING)) == 0
