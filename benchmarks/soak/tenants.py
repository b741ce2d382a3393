"""The twenty tenants: their disclosure, quotas and schedules, and the usage that their clients expect."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.truth import Sight
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import TenantStore

CANDIDATES = 40
"""Number of tokens whose head rows a tenant requests in all."""
BUDGET = Quotas(head_rows=30, full_distributions=3)
"""Budgets that their tenants exceed in the course of time."""
FLOODED = Quotas(tokens_per_minute=3000, concurrent_requests=8)
WELL_BEHAVED = 17
_DISCLOSURES = (
    Disclosure("candidate", rotated=True),
    Disclosure("full"),
    Disclosure("candidate"),
    Disclosure("full", rotated=True),
    Disclosure("none", rotated=True),
)
_QUOTAS = (
    Quotas(),
    Quotas(tokens_per_minute=50_000, tokens_per_day=10**9, concurrent_requests=50),
    BUDGET,
    Quotas(10**6, 10**9, 100, 10**4, 10**4),
)


@dataclass(frozen=True)
class Price:
    """Cost of one answer, by the rules of docs/protocol.md.

    Attributes:
        tokens: number of tokens that the model runs.
        rows: token ids of the answered LM head rows.
        distribution: index of the text in the pool whose full distribution is answered; None for no such answer.
    """

    tokens: int = 0
    rows: frozenset[int] = frozenset()
    distribution: int | None = None


@dataclass
class Account:
    """A tenant's usage by its clients' records.

    Attributes:
        requests: number of answers.
        tokens: tokens of all answers.
        rows: token ids of all answered LM head rows.
        distributions: texts of all answered full distributions.
        unanswered: prices of calls that the server may or may not have recorded, because it was killed or the client
            disconnected.
    """

    requests: int = 0
    tokens: int = 0
    rows: set[int] = field(default_factory=set)
    distributions: set[int] = field(default_factory=set)
    unanswered: list[Price] = field(default_factory=list)

    def add(self, price: Price) -> None:
        """Record one answer."""
        self.requests += 1
        self.tokens += price.tokens
        self.rows |= price.rows
        self.distributions |= set() if price.distribution is None else {price.distribution}

    def faults(self, days: Iterable[dict[str, Any]]) -> Iterator[str]:
        """Differences between the server's records of all days and the bounds that the clients' records give."""
        days = list(days)
        maybe = self.unanswered
        rows = self.rows.union(*(price.rows for price in maybe))
        distributions = self.distributions | {p.distribution for p in maybe if p.distribution is not None}
        bounds = {
            "requests": (self.requests, self.requests + len(maybe)),
            "tokens": (self.tokens, self.tokens + sum(price.tokens for price in maybe)),
            "head_rows": (len(self.rows), len(rows)),
            "full_distributions": (len(self.distributions), len(distributions)),
        }
        for name, (lower, upper) in bounds.items():
            recorded = sum(day[name] for day in days)
            if not lower <= recorded <= upper:
                yield f"{name} {recorded}, not {lower}" + (f" to {upper}" if upper > lower else "")


@dataclass
class Tenant:
    """One of the twenty tenants.

    Attributes:
        name: name of the tenant.
        key: its key.
        disclosure: its disclosure policy.
        quotas: its quotas.
        chance: random generator of its schedule: its calls, their times and their servers.
        candidates: tokens whose head rows it requests.
        account: its usage by its clients' records.
        sight: its view of the model; None until it has the model card.
    """

    name: str
    key: str
    disclosure: Disclosure
    quotas: Quotas
    chance: random.Random
    candidates: list[int]
    account: Account = field(default_factory=Account)
    sight: Sight | None = None

    def seen(self) -> Sight:
        """Its view of the model.

        Raises:
            RuntimeError: it has not requested its model card.
        """
        if self.sight is None:
            raise RuntimeError(f"{self.name} has not requested its model card.")
        return self.sight


def add_tenants(store: TenantStore, vocab_size: int, seed: int) -> tuple[list[Tenant], dict[str, Tenant]]:
    """Add all tenants. Return the well-behaved ones, and the others by what they do: flood, cut or garbage."""

    def tenant(name: str, disclosure: Disclosure, quotas: Quotas) -> Tenant:
        chance = random.Random(f"{seed} {name}")
        key = str(store.add(name, disclosure=disclosure, quotas=quotas))
        return Tenant(name, key, disclosure, quotas, chance, chance.sample(range(vocab_size), CANDIDATES))

    good = [
        tenant(f"good-{i}", _DISCLOSURES[i % len(_DISCLOSURES)], _QUOTAS[i % len(_QUOTAS)]) for i in range(WELL_BEHAVED)
    ]
    bad = {
        "flood": tenant("flood", _DISCLOSURES[0], FLOODED),
        "cut": tenant("cut", _DISCLOSURES[1], Quotas()),
        "garbage": tenant("garbage", _DISCLOSURES[0], Quotas()),
    }
    return good, bad
