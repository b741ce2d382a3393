"""Calibration of label probabilities: how often answers are right at each confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from data_owner_client.scoring.scorer import References

_BINS = 10


class ConfidenceBin(BaseModel):
    """Answers whose confidence is within one interval.

    Attributes:
        above: lower end of the interval, which it does not contain.
        up_to: upper end of the interval.
        count: number of answers.
        confidence: their mean confidence, 0 to 1; 0 without answers.
        accuracy: share of them that is right, 0 to 1; 0 without answers.
    """

    above: float
    up_to: float
    count: int
    confidence: float
    accuracy: float


class Calibration(BaseModel):
    """Calibration of the probabilities of labels.

    Attributes:
        expected_calibration_error: mean distance of confidence and accuracy over the bins, weighted by their counts
            (Guo et al. 2017, On Calibration of Modern Neural Networks); 0 is perfect.
        brier: mean squared distance of the probabilities from the right label's one-hot vector, summed over labels,
            0 to 2 (Brier 1950).
        log_loss: mean negative log-probability of the right label, in nats.
        bins: answers by confidence, which is the probability of the most probable label, in intervals of equal width; a
            reliability table.
    """

    expected_calibration_error: float
    brier: float
    log_loss: float
    bins: list[ConfidenceBin]


def calibration(probabilities: Sequence[Mapping[str, float]], references: Sequence[References]) -> Calibration:
    """Calibration of the probabilities of labels.

    Args:
        probabilities: of each text, the probability of each label; they sum to 1, and a missing label has 0.
        references: right labels of each text; where there are several, the most probable of them counts.
    """
    pairs = list(zip(probabilities, references, strict=True))
    truth_E = np.array([max(of_text.get(label, 0.0) for label in texts) for of_text, texts in pairs])
    right_E = np.array([max(of_text, key=lambda label: of_text[label]) in texts for of_text, texts in pairs])
    confidence_E = np.array([max(of_text.values()) for of_text in probabilities])
    squares_E = np.array([sum(p * p for p in of_text.values()) for of_text in probabilities])
    edges = np.linspace(0, 1, _BINS + 1)
    bin_E = np.digitize(confidence_E, edges[1:-1], right=True)
    rows = [
        _bin(above, up_to, confidence_E[bin_E == number], right_E[bin_E == number])
        for number, (above, up_to) in enumerate(pairwise(edges.tolist()))
    ]
    gaps = [row.count * abs(row.confidence - row.accuracy) for row in rows]
    return Calibration(
        expected_calibration_error=sum(gaps) / len(pairs),
        brier=float((squares_E - 2 * truth_E + 1).mean()),
        log_loss=float(-np.log(truth_E.clip(np.finfo(np.float64).tiny)).mean()),
        bins=rows,
    )


def _bin(above: float, up_to: float, confidence_E: NDArray[np.float64], right_E: NDArray[np.bool_]) -> ConfidenceBin:
    """The answers of one interval."""
    means = (float(confidence_E.mean()), float(right_E.mean())) if len(right_E) else (0.0, 0.0)
    return ConfidenceBin(above=above, up_to=up_to, count=len(right_E), confidence=means[0], accuracy=means[1])
