"""Acceptance rate of the server's drafts."""

from __future__ import annotations

from dataclasses import dataclass, field

# Before measurements: how often the PLM's top-1 differed from the mixture's in a prototype.
_PRIOR_DISAGREEMENT = 0.45  # times λ
_PRIOR_WEIGHT = 8.0
_BUCKETS = 10


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
