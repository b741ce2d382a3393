"""Metrics that are functions of sums over texts, and their paired bootstrap test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 1000
"""Resamples of a paired bootstrap test."""
# The seed of sacrebleu's own test.
_SEED = 12345
_RESAMPLES_AT_ONCE = 50


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of a metric.

    Attributes:
        sums_E_F: numbers of each text, whose sums over texts decide the metric; dense, or a sparse array of SciPy.
        value: the metric from sums of any shape [..., F], as an array [...].
    """

    sums_E_F: Array
    value: Callable[[Array], Array]

    @property
    def score(self) -> float:
        """The metric of all texts together."""
        return float(self.value(self.sums_E_F.sum(0)))


def mean(score_E: Sequence[float] | Array) -> Statistics:
    """Statistics of a metric that is the mean of a score over texts.

    Args:
        score_E: the score of each text.
    """
    scores = np.asarray(score_E, np.float64)
    return Statistics(np.stack([scores, np.ones_like(scores)], -1), lambda sums_F: sums_F[..., 0] / sums_F[..., 1])


def micro_f1(counts_E_3: Sequence[tuple[int, int, int]]) -> Statistics:
    """Statistics of F1 over the items of all texts together, 0 to 100.

    Args:
        counts_E_3: of each text, the items that answer and reference share, those of the answer, and the reference's.
    """
    return Statistics(np.asarray(counts_E_3, np.float64).reshape(-1, 3), f1)


def f1(counts: Array) -> Array:
    """F1, 0 to 100, from counts [..., 3] of shared, answered and right items; 0 where there are none."""
    shared, answered, right = np.moveaxis(counts, -1, 0)
    return np.asarray(200 * shared / np.maximum(answered + right, 1))


def paired_p_value(baseline: Statistics, system: Statistics) -> float:
    """The p-value of the difference between two systems on the same texts, by paired bootstrap resampling.

    With d the absolute difference of both scores, and d_r that of resample r of n, it is
    (1 + #{r: d_r - mean(d_r) >= d}) / (n + 1), as in sacrebleu (`_paired_bs_test`), whose resamples these are.
    Sacrebleu counts ">" where this has ">=", and so finds a system different from itself.

    Where d is much larger than its spread, d_r is never negative, and this is the one-sided p-value: half the two-sided
    one. It is 1 for a single text, of which every resample is the same.
    """
    if baseline.sums_E_F.shape[0] == 1:
        return 1.0
    difference = abs(system.score - baseline.score)
    of_resample = np.concatenate(
        [
            np.abs(system.value(weight_B_E @ system.sums_E_F) - baseline.value(weight_B_E @ baseline.sums_E_F))
            for weight_B_E in _resamples(baseline.sums_E_F.shape[0])
        ]
    )
    # Rounding must not part what is equal.
    as_large = of_resample - of_resample.mean() >= difference - 1e-9
    return (int(as_large.sum()) + 1) / (RESAMPLES + 1)


class StatisticsScorer(ABC):
    """The part of a scorer that follows from the statistics of its metrics."""

    @abstractmethod
    def statistics(self, answers: Sequence[str]) -> dict[str, Statistics]:
        """Statistics of the metrics, by key."""

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Scores of all answers together, by key of the metric."""
        return {key: statistics.score for key, statistics in self.statistics(answers).items()}

    def p_values(self, baseline: Sequence[str], systems: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """For each system, p-values of its difference from the baseline, by key of the metric."""
        of_baseline = self.statistics(baseline)
        return [
            {key: paired_p_value(of_baseline[key], statistics) for key, statistics in self.statistics(system).items()}
            for system in systems
        ]


def _resamples(count: int) -> Iterator[Array]:
    """Yield the counts of each text in each resample, some resamples at a time [B, E]."""
    generator = np.random.default_rng(_SEED)
    for _ in range(RESAMPLES // _RESAMPLES_AT_ONCE):
        drawn_B_E = generator.choice(count, size=(_RESAMPLES_AT_ONCE, count), replace=True)
        yield np.stack([np.bincount(drawn_E, minlength=count) for drawn_E in drawn_B_E]).astype(np.float64)
