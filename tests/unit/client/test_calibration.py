"""Calibration of label probabilities, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from data_owner_client.scoring.calibration import calibration
from tests.profiles import scaled

LABELS = ["a", "b", "c"]
WEIGHTS = st.lists(st.integers(1, 50), min_size=3, max_size=3)


def test_a_table_by_hand() -> None:
    probabilities = [{"a": 0.9, "b": 0.1}, {"a": 0.85, "b": 0.15}, {"b": 0.6, "a": 0.4}, {"a": 1.0, "b": 0.0}]
    got = calibration(probabilities, [("a",), ("b",), ("b", "a"), ("a",)])
    rows = [(row.above, row.up_to, row.count, row.confidence, row.accuracy) for row in got.bins if row.count]
    expected = [(0.5, 0.6, 1, 0.6, 1.0), (0.8, 0.9, 2, 0.875, 0.5), (0.9, 1.0, 1, 1.0, 1.0)]
    assert np.array(rows) == pytest.approx(np.array(expected))
    assert got.expected_calibration_error == pytest.approx((0.4 + 2 * 0.375 + 0) / 4)
    assert sum(row.count for row in got.bins) == 4
    assert len(got.bins) == 10


@settings(max_examples=scaled(60))
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 50), min_size=3, max_size=3), st.sampled_from(LABELS)),
        min_size=1,
        max_size=20,
    )
)
def test_losses_are_those_of_scikit_learn(rows: list[tuple[list[int], str]]) -> None:
    weights = np.array([weights for weights, _ in rows], np.float64)
    probability_E_L = weights / weights.sum(1, keepdims=True)
    truths = [label for _, label in rows]
    probabilities = [dict(zip(LABELS, row, strict=True)) for row in probability_E_L.tolist()]
    got = calibration(probabilities, [(label,) for label in truths])
    assert got.log_loss == pytest.approx(log_loss(truths, probability_E_L, labels=LABELS))
    expected = brier_score_loss(truths, probability_E_L, labels=LABELS, scale_by_half=False)
    assert got.brier == pytest.approx(expected)
    assert 0 <= got.expected_calibration_error <= 1
    assert sum(row.count for row in got.bins) == len(rows)
    assert all(row.above < row.confidence <= row.up_to for row in got.bins if row.count)


def test_confidences_that_come_true_are_calibrated() -> None:
    probabilities = [{"a": 0.75, "b": 0.25}] * 4
    assert calibration(probabilities, [("a",)] * 3 + [("b",)]).expected_calibration_error == pytest.approx(0)


def test_a_right_label_without_probability_has_a_finite_loss() -> None:
    assert calibration([{"a": 1.0, "b": 0.0}], [("b",)]).log_loss == pytest.approx(708.4, abs=0.1)
