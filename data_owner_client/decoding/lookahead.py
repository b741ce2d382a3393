"""How many tokens the server shall draft: as many as pay.

A draft that the mixture agrees with saves a round trip; one that it rejects has cost the server a row for nothing. The
plan is the one with the most expected tokens per second, from the agreement seen so far and the measured costs.
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


@dataclass
class Agreement:
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
class Costs:
    """Seconds of a round: overhead + steps · step + rows · row, learned from the rounds themselves.

    `steps` are the server's forward passes in a row, `rows` the positions in them, of all sequences together.
    """

    overhead_s: float | None = None
    _products: np.ndarray = field(default_factory=lambda: np.diag([1e-2, 1e-2]))
    _moments: np.ndarray = field(default_factory=lambda: np.array([1e-2 * 2e-2, 1e-2 * 1e-3]))

    def learn(self, *, round_s: float, compute_s: float, steps: int, rows: int) -> None:
        """One round: how long it took in all, and how long the model worked on it."""
        overhead_s = max(0.0, round_s - compute_s)
        self.overhead_s = overhead_s if self.overhead_s is None else 0.7 * self.overhead_s + 0.3 * overhead_s
        sizes = np.array([steps, rows], dtype=float)
        self._products = _DECAY * self._products + np.outer(sizes, sizes)
        self._moments = _DECAY * self._moments + sizes * compute_s

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.overhead_s is not None

    def step_and_row(self) -> tuple[float, float]:
        """Seconds of a step and of a row, neither negative."""
        ridge = np.diag(np.diag(self._products)) * 1e-3
        step_s, row_s = np.linalg.solve(self._products + ridge, self._moments)
        if row_s < 0:
            return float(self._moments[0] / self._products[0, 0]), 0.0
        if step_s < 0:
            return 0.0, float(self._moments[1] / self._products[1, 1])
        return float(step_s), float(row_s)


def plan(chances: Sequence[Sequence[float]], costs: Costs) -> list[int]:
    """Drafts for each sequence of a batch, so that the tokens expected per second are the most.

    The ratio is maximised by Dinkelbach's method: at the price of time that the best ratio so far sets, every draft
    that is worth more than its row is taken, and the number of steps that gains most.

    Args:
        chances: for each sequence, the probability that its next draft agrees, then the one after that, and so on.
        costs: of a round.
    """
    batch = len(chances)
    step_s, row_s = costs.step_and_row()
    base_s = (costs.overhead_s or 0.0) + step_s + batch * row_s
    longest = max(map(len, chances), default=0)
    survival_B_K = np.zeros((batch, longest))
    for row, own in zip(survival_B_K, chances, strict=True):
        row[: len(own)] = np.cumprod(own[:longest])
    best = np.zeros(batch, dtype=int)
    rate = batch / max(base_s, 1e-9)
    for _ in range(10):
        worth_B_K = survival_B_K - rate * row_s
        # Survival falls along a sequence, so what is worth its row comes first.
        gain_K = np.maximum(worth_B_K, 0.0).sum(axis=0) - rate * step_s
        steps = int(np.argmax(np.concatenate([[0.0], np.cumsum(gain_K)])))
        drafts_B = np.minimum((worth_B_K > 0).sum(axis=1), steps)
        expected = batch + sum(own[:k].sum() for own, k in zip(survival_B_K, drafts_B, strict=True))
        seconds = base_s + steps * step_s + int(drafts_B.sum()) * row_s
        if expected / max(seconds, 1e-9) <= rate * (1 + 1e-9):
            break
        rate, best = expected / max(seconds, 1e-9), drafts_B
    return [int(k) for k in best]
