"""Planning of drafts: how many tokens to draft in a round, and on which side.

An accepted draft saves a round trip; a rejected one costs the server a row for nothing. `CostModelPlanner` maximises
the expected tokens per second, from the measured acceptance and costs, of which it overestimates the round trip.
`AcceptedRunPlanner` and `FixedPlanner` are simpler rules behind the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Literal, Protocol

import numpy as np

from data_owner_client.decoding.settings import DecodingSettings

PlannerName = Literal["cost-model", "accepted-run", "fixed-2", "fixed-4", "fixed-8"]

MAX_DRAFTS = 16
"""Drafts worth planning for: beyond them hardly any draft is accepted with all before it."""
# Drafts of the first rounds, until costs are measured, and for servers that do not report their times.
_UNMEASURED_LOOK_AHEAD = 2
# Before measurements: how often the PLM's top-1 differed from the mixture's in a prototype.
_PRIOR_DISAGREEMENT = 0.45  # times λ
_PRIOR_WEIGHT = 8.0
_BUCKETS = 10
_DECAY = 0.9
# Prior cost of a step besides its rows, in rows; and its weight against measurements.
_ROWS_A_STEP = 20.0
_RIDGE = 1e-2
# Factor on the measured overhead of a round trip. Networks have bad moments that averages hide, and near the best plan
# others are nearly as fast that need far fewer round trips.
_CAUTION = 5.0


@dataclass
class AcceptanceStats:
    """Acceptance rate of the server's drafts, by λ.

    Attributes:
        drafted: drafts that the mixture checked, for λ from 0 to 1 in tenths.
        accepted: drafts that the mixture accepted, for λ from 0 to 1 in tenths.
    """

    drafted: list[int] = field(default_factory=lambda: [0] * (_BUCKETS + 1))
    accepted: list[int] = field(default_factory=lambda: [0] * (_BUCKETS + 1))

    def observe(self, lambda_t: float, *, accepted: bool) -> None:
        """Count one checked draft at this λ."""
        bucket = round(lambda_t * _BUCKETS)
        self.drafted[bucket] += 1
        self.accepted[bucket] += accepted

    def rate(self, lambda_t: float) -> float:
        """Probability that the mixture accepts a draft at this λ."""
        bucket = round(lambda_t * _BUCKETS)
        prior = 1.0 - _PRIOR_DISAGREEMENT * lambda_t
        return (self.accepted[bucket] + _PRIOR_WEIGHT * prior) / (self.drafted[bucket] + _PRIOR_WEIGHT)


@dataclass
class RoundCostModel:
    """Seconds of a round: overhead + steps · step + rows · row, fitted to the rounds so far.

    `steps` are the server's successive forward passes, `rows` the positions in them, over all sequences. Similar rounds
    cannot separate the cost of a step from that of its rows: the prior is then that a step costs as much as a few rows.

    Attributes:
        overhead_s: mean time of a round outside the model, in seconds; None before the first round.
    """

    overhead_s: float | None = None
    _products: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    _moments: np.ndarray = field(default_factory=lambda: np.zeros(2))
    _has_prefill: bool = False

    def observe(self, *, round_s: float, compute_s: float, steps: int, rows: int, has_prefill: bool = False) -> None:
        """Learn from one round.

        Args:
            round_s: seconds of the round.
            compute_s: seconds of the model's work in it.
            steps: forward passes.
            rows: positions drafted or checked.
            has_prefill: the round also ran prompts, at a cost of its own; it counts only until another one is seen.
        """
        overhead_s = max(0.0, round_s - compute_s)
        self.overhead_s = overhead_s if self.overhead_s is None else 0.7 * self.overhead_s + 0.3 * overhead_s
        if has_prefill and self.measured:
            return
        sizes = np.array([steps, rows], dtype=float)
        # A round without prompts replaces all that was learned from one with prompts.
        decay = 0.0 if self._has_prefill and not has_prefill else _DECAY
        self._has_prefill = has_prefill
        self._products = decay * self._products + np.outer(sizes, sizes)
        self._moments = decay * self._moments + sizes * compute_s

    @property
    def measured(self) -> bool:
        """True after the first round."""
        return bool(self._products.any())

    def step_and_row(self) -> tuple[float, float]:
        """Seconds of a step and of a row, neither negative."""
        prior = np.array([_ROWS_A_STEP, 1.0])
        prior *= prior @ self._moments / (prior @ self._products @ prior)
        ridge = np.diag(np.diag(self._products)) * _RIDGE
        step_s, row_s = np.linalg.solve(self._products + ridge, self._moments + ridge @ prior)
        if row_s < 0:
            return float(self._moments[0] / self._products[0, 0]), 0.0
        if step_s < 0:
            return 0.0, float(self._moments[1] / self._products[1, 1])
        return float(step_s), float(row_s)


@dataclass(frozen=True)
class DraftPlan:
    """Number of drafts of one sequence in a round, on one of the two sides.

    Attributes:
        client_drafts: drafts of the client, checked in one pass.
        look_ahead: drafts of the server, one step each.
    """

    client_drafts: int = 0
    look_ahead: int = 0


class DraftPlanner(Protocol):
    """A rule for the number of drafts.

    Attributes:
        max_look_ahead: drafts of the server that it considers for a sequence.
    """

    max_look_ahead: int

    def plan(self, server: Sequence[Sequence[float]], client: Sequence[Sequence[float]]) -> list[DraftPlan]:
        """Plan the drafts of each sequence of a batch.

        Args:
            server: for each sequence, the acceptance probability of each successive draft of the server, if all before
                are accepted; no longer than the server allows.
            client: for each sequence, the acceptance probability of each draft of the client.
        """

    def observe(self, *, round_s: float, compute_s: float, steps: int, rows: int, has_prefill: bool) -> None:
        """Learn from one round; see `RoundCostModel.observe`."""


class CostModelPlanner:
    """Plans the most expected tokens per second by measured costs."""

    max_look_ahead = MAX_DRAFTS

    def __init__(self) -> None:
        self._costs = RoundCostModel()
        self.observe = self._costs.observe

    def plan(self, server: Sequence[Sequence[float]], client: Sequence[Sequence[float]]) -> list[DraftPlan]:
        """Plan by `plan_drafts`; two drafts of the server until costs are measured."""
        if not self._costs.measured:
            return [DraftPlan(look_ahead=min(_UNMEASURED_LOOK_AHEAD, len(each))) for each in server]
        return plan_drafts(server, client, self._costs)


class AcceptedRunPlanner:
    """Drafts the expected accepted run, on the side where it is longer.

    With a constant acceptance probability p the run is p / (1 − p), bounded by the drafts that are considered.
    """

    max_look_ahead = MAX_DRAFTS

    def plan(self, server: Sequence[Sequence[float]], client: Sequence[Sequence[float]]) -> list[DraftPlan]:
        """Plan each sequence alone."""
        plans = []
        for server_run, client_run in zip(map(_expected_run, server), map(_expected_run, client), strict=True):
            if client_run > server_run:
                plans.append(DraftPlan(client_drafts=max(1, round(client_run))))
            else:
                plans.append(DraftPlan(look_ahead=round(server_run)))
        return plans

    def observe(self, *, round_s: float, compute_s: float, steps: int, rows: int, has_prefill: bool) -> None:
        """Ignore costs."""


class FixedPlanner:
    """Drafts a fixed number on the server, or all drafts of the client where the first is likelier to be accepted.

    Args:
        look_ahead: drafts of the server.
    """

    def __init__(self, look_ahead: int) -> None:
        self._look_ahead = look_ahead
        self.max_look_ahead = max(1, look_ahead)  # the first acceptance probability decides between the sides

    def plan(self, server: Sequence[Sequence[float]], client: Sequence[Sequence[float]]) -> list[DraftPlan]:
        """Plan each sequence alone."""
        return [
            DraftPlan(client_drafts=len(client_M))
            if client_M and (not server_K or client_M[0] > server_K[0])
            else DraftPlan(look_ahead=min(self._look_ahead, len(server_K)))
            for server_K, client_M in zip(server, client, strict=True)
        ]

    def observe(self, *, round_s: float, compute_s: float, steps: int, rows: int, has_prefill: bool) -> None:
        """Ignore costs."""


@dataclass(frozen=True, kw_only=True)
class VariantDecodingSettings(DecodingSettings):
    """Decoding settings that also choose the planner, for `benchmarks/decode.py --variants`.

    Attributes:
        planner: Planner of drafts where `look_ahead` is None; prompt-lookup drafts stay on.
    """

    planner: PlannerName = "cost-model"


def planner_for(settings: DecodingSettings) -> DraftPlanner:
    """A new planner, as the settings say."""
    if settings.look_ahead is not None:
        return FixedPlanner(settings.look_ahead)
    name = settings.planner if isinstance(settings, VariantDecodingSettings) else "cost-model"
    if name == "cost-model":
        return CostModelPlanner()
    if name == "accepted-run":
        return AcceptedRunPlanner()
    return FixedPlanner(int(name.removeprefix("fixed-")))


def _expected_run(acceptance: Sequence[float]) -> float:
    """Expected number of drafts accepted in a row."""
    return float(sum(accumulate(acceptance, mul)))


def plan_drafts(
    server: Sequence[Sequence[float]], client: Sequence[Sequence[float]], costs: RoundCostModel
) -> list[DraftPlan]:
    """Drafts for each sequence of a batch that maximise the expected tokens per (cautious) second.

    Dinkelbach's method maximises the ratio. The best ratio so far sets a price of time. At that price the plan takes
    every draft worth more than its row, from the side that gains more, and the number of steps that gains most.

    Args:
        server: for each sequence, the acceptance probability of each successive draft of the server, if all before are
            accepted.
        client: for each sequence, the acceptance probability of each successive draft of the client.
        costs: costs of a round.
    """
    batch = len(server)
    step_s, row_s = costs.step_and_row()
    base_s = _CAUTION * (costs.overhead_s or 0.0) + step_s + batch * row_s
    server_B_K, client_B_M = _survival(server), _survival(client)
    best = [DraftPlan()] * batch
    rate = batch / max(base_s, 1e-9)
    for _ in range(10):
        plans = _plan_at(server_B_K, client_B_M, rate * row_s, rate * step_s)
        expected = float(batch)
        for d, server_K, client_M in zip(plans, server_B_K, client_B_M, strict=True):
            expected += server_K[: d.look_ahead].sum() + client_M[: d.client_drafts].sum()
        steps = max(d.look_ahead for d in plans) + (len({d.client_drafts > 0 for d in plans}) > 1)
        seconds = base_s + steps * step_s + sum(d.look_ahead + d.client_drafts for d in plans) * row_s
        if expected / max(seconds, 1e-9) <= rate * (1 + 1e-9):
            break
        rate, best = expected / max(seconds, 1e-9), plans
    return best


def _plan_at(server_B_K: np.ndarray, client_B_M: np.ndarray, row: float, step: float) -> list[DraftPlan]:
    """The drafts that gain most at a price of rows and steps in tokens."""
    batch, longest = server_B_K.shape
    # Survival falls along a sequence, so what is worth its row comes first.
    server_B_J = np.cumsum(np.maximum(server_B_K - row, 0.0), axis=1)
    server_B_J = np.concatenate([np.zeros((batch, 1)), server_B_J], axis=1)
    price_J = step * np.arange(longest + 1)
    look_ahead_B = (server_B_K > row).sum(axis=1)
    client_B = (client_B_M > row).sum(axis=1)
    gain_B_1 = np.maximum(client_B_M - row, 0.0).sum(axis=1, keepdims=True)

    server_only_J = server_B_J.sum(axis=0) - price_J
    # Drafts of the client run in one pass, sequences without them in another.
    mixed_J = np.maximum(server_B_J, gain_B_1).sum(axis=0) - price_J - step
    # One pass is enough if every sequence has one, even where it is not worth its row.
    forced_B_1 = np.where(gain_B_1 > 0, gain_B_1, client_B_M[:, :1] - row)
    all_client = forced_B_1.sum() if _all_have(client_B_M) else -np.inf
    if all_client >= max(server_only_J.max(), mixed_J.max()):
        return [DraftPlan(client_drafts=max(1, int(m))) for m in client_B]
    if mixed_J.max() > server_only_J.max():
        steps = int(np.argmax(mixed_J))
        takes_client_B = gain_B_1[:, 0] > server_B_J[:, steps]
    else:
        steps, takes_client_B = int(np.argmax(server_only_J)), np.zeros(batch, dtype=bool)
    return [
        DraftPlan(client_drafts=int(m)) if takes_client else DraftPlan(look_ahead=min(int(k), steps))
        for takes_client, m, k in zip(takes_client_B, client_B, look_ahead_B, strict=True)
    ]


def _all_have(survival_B_K: np.ndarray) -> bool:
    return survival_B_K.shape[1] > 0 and bool((survival_B_K[:, 0] > 0).all())


def _survival(acceptance: Sequence[Sequence[float]]) -> np.ndarray:
    """Probability [B, K] that a draft and all before it are accepted; 0 where there is no draft."""
    survival_B_K = np.zeros((len(acceptance), max(map(len, acceptance), default=0)))
    for row_K, each in zip(survival_B_K, acceptance, strict=True):
        row_K[: len(each)] = np.cumprod(each)
    return survival_B_K
