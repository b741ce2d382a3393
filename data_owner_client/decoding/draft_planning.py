"""How many tokens are drafted, and by whom: as many as pay.

A draft that the mixture agrees with saves a round trip; one that it rejects has cost the server a row for nothing. The
plan is the one with the most expected tokens per second, from the agreement seen so far and the measured costs, of
which that of a round trip is rather overestimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MOST_DRAFTS = 16
"""Tokens that are worth planning for: beyond them hardly any draft agrees with all before it."""
# Before anything is measured: what a prototype saw of the PLM's own top token agreeing with the mixture's.
_PRIOR_DISAGREEMENT = 0.45  # times λ
_PRIOR_WEIGHT = 8.0
_BUCKETS = 10
_DECAY = 0.9
# What a step costs besides its rows, in rows; and how much that counts against what was measured.
_ROWS_A_STEP = 20.0
_TRUST = 1e-2
# A round trip is taken to cost so many times the overhead that was measured: networks have bad moments that averages
# hide, and near the best plan others are nearly as fast that need far fewer round trips.
_CAUTION = 5.0


@dataclass
class AcceptanceStats:
    """Of drafts offered, how many the mixture agreed with, by λ.

    Attributes:
        offered: drafts that were looked at, for λ from 0 to 1 in tenths.
        accepted: those of them that agreed.
    """

    offered: list[int] = field(default_factory=lambda: [0] * (_BUCKETS + 1))
    accepted: list[int] = field(default_factory=lambda: [0] * (_BUCKETS + 1))

    def learn(self, weight: float, *, agreed: bool) -> None:
        """One draft that was looked at, at this λ."""
        bucket = round(weight * _BUCKETS)
        self.offered[bucket] += 1
        self.accepted[bucket] += agreed

    def rate(self, weight: float) -> float:
        """Probability that the mixture agrees at this λ."""
        bucket = round(weight * _BUCKETS)
        prior = 1.0 - _PRIOR_DISAGREEMENT * weight
        return (self.accepted[bucket] + _PRIOR_WEIGHT * prior) / (self.offered[bucket] + _PRIOR_WEIGHT)


@dataclass
class RoundCostModel:
    """Seconds of a round: overhead + steps · step + rows · row, learned from the rounds themselves.

    `steps` are the server's forward passes one after another, `rows` the positions in them, of all sequences together.
    Rounds are often alike, and then cannot tell a step from its rows: as far as they cannot, a step is taken to cost as
    much as a few rows.
    """

    overhead_s: float | None = None
    _products: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    _moments: np.ndarray = field(default_factory=lambda: np.zeros(2))
    _begun: bool = False

    def learn(self, *, round_s: float, compute_s: float, steps: int, rows: int, begins: bool = False) -> None:
        """One round: how long it took in all, and how long the model worked on it.

        One that also ran prompts (`begins`), of unknown cost, counts for less than any other.
        """
        overhead_s = max(0.0, round_s - compute_s)
        self.overhead_s = overhead_s if self.overhead_s is None else 0.7 * self.overhead_s + 0.3 * overhead_s
        if begins and self.known:
            return
        sizes = np.array([steps, rows], dtype=float)
        # What was learned from a round with prompts gives way to any other.
        decay = 0.0 if self._begun and not begins else _DECAY
        self._begun = begins
        self._products = decay * self._products + np.outer(sizes, sizes)
        self._moments = decay * self._moments + sizes * compute_s

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._products.any())

    def step_and_row(self) -> tuple[float, float]:
        """Seconds of a step and of a row, neither negative."""
        usual = np.array([_ROWS_A_STEP, 1.0])
        usual *= usual @ self._moments / (usual @ self._products @ usual)
        ridge = np.diag(np.diag(self._products)) * _TRUST
        step_s, row_s = np.linalg.solve(self._products + ridge, self._moments + ridge @ usual)
        if row_s < 0:
            return float(self._moments[0] / self._products[0, 0]), 0.0
        if step_s < 0:
            return 0.0, float(self._moments[1] / self._products[1, 1])
        return float(step_s), float(row_s)


@dataclass(frozen=True)
class DraftPlan:
    """What is drafted of one sequence in a round: by the client or by the server.

    Attributes:
        offered: drafts of the client's own, checked in one pass.
        look_ahead: drafts of the server, a step each.
    """

    offered: int = 0
    look_ahead: int = 0


def plan_drafts(
    chances: Sequence[Sequence[float]], offers: Sequence[Sequence[float]], costs: RoundCostModel
) -> list[DraftPlan]:
    """Drafts for each sequence of a batch, so that the tokens expected per (cautious) second are the most.

    The ratio is maximised by Dinkelbach's method: at the price of time that the best ratio so far sets, every draft
    that is worth more than its row is taken, from the side that gains more by it, and the number of steps that gains
    most.

    Args:
        chances: for each sequence, the probability that the server's next draft agrees, then the one after that, and
            so on.
        offers: the same of the client's own drafts.
        costs: of a round.
    """
    batch = len(chances)
    step_s, row_s = costs.step_and_row()
    base_s = _CAUTION * (costs.overhead_s or 0.0) + step_s + batch * row_s
    server_B_K, client_B_M = _survival(chances), _survival(offers)
    best = [DraftPlan()] * batch
    rate = batch / max(base_s, 1e-9)
    for _ in range(10):
        drafts = _plan_at(server_B_K, client_B_M, rate * row_s, rate * step_s)
        expected = float(batch)
        for d, server_K, client_M in zip(drafts, server_B_K, client_B_M, strict=True):
            expected += server_K[: d.look_ahead].sum() + client_M[: d.offered].sum()
        steps = max(d.look_ahead for d in drafts) + (len({d.offered > 0 for d in drafts}) > 1)
        seconds = base_s + steps * step_s + sum(d.look_ahead + d.offered for d in drafts) * row_s
        if expected / max(seconds, 1e-9) <= rate * (1 + 1e-9):
            break
        rate, best = expected / max(seconds, 1e-9), drafts
    return best


def _plan_at(server_B_K: np.ndarray, client_B_M: np.ndarray, row: float, step: float) -> list[DraftPlan]:
    """The drafts that gain most if rows and steps cost so many tokens."""
    batch, longest = server_B_K.shape
    # Survival falls along a sequence, so what is worth its row comes first.
    server_B_S = np.cumsum(np.maximum(server_B_K - row, 0.0), axis=1)
    server_B_S = np.concatenate([np.zeros((batch, 1)), server_B_S], axis=1)
    price_S = step * np.arange(longest + 1)
    drafted_B = (server_B_K > row).sum(axis=1)
    offered_B = (client_B_M > row).sum(axis=1)
    own_B_1 = np.maximum(client_B_M - row, 0.0).sum(axis=1, keepdims=True)

    without_S = server_B_S.sum(axis=0) - price_S
    # Drafts of the client's own run in a pass of their own, besides that of the sequences which have none.
    with_own_S = np.maximum(server_B_S, own_B_1).sum(axis=0) - price_S - step
    # Unless all have one, even where it is not worth its row.
    forced_B_1 = np.where(own_B_1 > 0, own_B_1, client_B_M[:, :1] - row)
    all_own = forced_B_1.sum() if _all_have(client_B_M) else -np.inf
    if all_own >= max(without_S.max(), with_own_S.max()):
        return [DraftPlan(offered=max(1, int(m))) for m in offered_B]
    if with_own_S.max() > without_S.max():
        steps = int(np.argmax(with_own_S))
        takes_own_B = own_B_1[:, 0] > server_B_S[:, steps]
    else:
        steps, takes_own_B = int(np.argmax(without_S)), np.zeros(batch, dtype=bool)
    return [
        DraftPlan(offered=int(m)) if own else DraftPlan(look_ahead=min(int(k), steps))
        for own, m, k in zip(takes_own_B, offered_B, drafted_B, strict=True)
    ]


def _all_have(survival_B_K: np.ndarray) -> bool:
    return survival_B_K.shape[1] > 0 and bool((survival_B_K[:, 0] > 0).all())


def _survival(chances: Sequence[Sequence[float]]) -> np.ndarray:
    """Probability [B, K] that a draft agrees and all before it do; 0 where there is none."""
    survival_B_K = np.zeros((len(chances), max(map(len, chances), default=0)))
    for row, own in zip(survival_B_K, chances, strict=True):
        row[: len(own)] = np.cumprod(own)
    return survival_B_K
