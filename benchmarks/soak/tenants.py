"""The twenty tenants: what each may see and use, what it asks for, and what its clients know that it has used."""

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
"""Tokens whose head rows a tenant asks for, in all."""
BUDGET = Quotas(head_rows=30, full_distributions=3)
"""Less than its tenant asks for, in the course of time."""
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
    """What one answer costs, by the rule of docs/protocol.md.

    Attributes:
        tokens: that the model works on.
        rows: of the LM head.
        distribution: text of the pool whose full distribution it is.
    """

    tokens: int = 0
    rows: frozenset[int] = frozenset()
    distribution: int | None = None


@dataclass
class Account:
    """What a tenant's clients know of its use.

    Attributes:
        answered: prices of all answers, added up.
        unanswered: of calls of which nobody knows whether they were put down: a server was killed, or the client left.
    """

    requests: int = 0
    tokens: int = 0
    rows: set[int] = field(default_factory=set)
    distributions: set[int] = field(default_factory=set)
    unanswered: list[Price] = field(default_factory=list)

    def add(self, price: Price) -> None:
        """One answer."""
        self.requests += 1
        self.tokens += price.tokens
        self.rows |= price.rows
        self.distributions |= set() if price.distribution is None else {price.distribution}

    def faults(self, days: Iterable[dict[str, Any]]) -> Iterator[str]:
        """Where what the server has put down on all days is neither less nor more than it may be."""
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
        for name, (least, most) in bounds.items():
            told = sum(day[name] for day in days)
            if not least <= told <= most:
                yield f"{name} {told}, not {least}" + (f" to {most}" if most > least else "")


@dataclass
class Tenant:
    """One of the twenty.

    Attributes:
        chance: its seeded schedule: what its clients ask for, when, of which server.
        candidates: tokens whose head rows it asks for.
        sight: how it sees the model; known once its card is.
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
        """How it sees the model."""
        if self.sight is None:
            raise RuntimeError(f"{self.name} has not asked for its card.")
        return self.sight


def let_in(store: TenantStore, vocab_size: int, seed: int) -> tuple[list[Tenant], dict[str, Tenant]]:
    """The well-behaved ones; and those who flood, cut and send garbage, by that."""

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
