"""Scores of labels: accuracy, macro-F1, a table of the labels and their confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from data_owner_client.scoring.bootstrap import Array, Statistics, StatisticsScorer, f1, mean
from data_owner_client.scoring.scorer import Metric, References

OTHER = "other"
"""Title of the answers that are no label."""


class LabelScores(BaseModel):
    """Scores of one label.

    Attributes:
        label: the label.
        precision: share of the answers with this label that are right, 0 to 100; 0 without such answers.
        recall: share of the texts with this label that are answered with it, 0 to 100; 0 without such texts.
        f1: harmonic mean of both.
        count: number of texts with this label.
    """

    label: str
    precision: float
    recall: float
    f1: float
    count: int


class Confusion(BaseModel):
    """Counts of the answers to each label's texts.

    Attributes:
        labels: the labels.
        counts: for each label, how many of its texts were answered with each of the labels, and with no label.
    """

    labels: list[str]
    counts: list[list[int]]


class ClassificationScorer(StatisticsScorer):
    """Accuracy, and macro-F1 over the labels of the references.

    An answer that is no label is wrong: it lowers the recall of the text's label, and no label's precision. A label
    without texts has no F1, and macro-F1 leaves it out. So the right answers score 100, and all systems on the same
    texts are scored over the same labels.

    Args:
        references: right labels of each text; where there are several, that of the answer counts, or else the first.
        labels: labels of the task, in the order of tables; those of the references follow, where they have others.
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"accuracy": Metric("accuracy"), "macro_f1": Metric("macro-F1")})
    headline = "accuracy"
    signatures: Mapping[str, str] = MappingProxyType({})

    def __init__(self, references: Sequence[References], labels: Sequence[str] = ()) -> None:
        self._references = references
        self.labels = list(dict.fromkeys([*labels, *sorted({text for texts in references for text in texts})]))

    def each(self, answers: Sequence[str]) -> Tensor:
        """100 for each right answer and 0 for each other [E], float64."""
        truth_E, answer_E = self._truths_and_answers(answers)
        return torch.tensor(100.0 * (truth_E == answer_E), dtype=torch.float64)

    def statistics(self, answers: Sequence[str]) -> dict[str, Statistics]:
        from scipy.sparse import hstack  # slow to import

        truth_E, answer_E = self._truths_and_answers(answers)
        truth_E_L, answer_E_L = self._one_hot(truth_E)[:, :-1], self._one_hot(answer_E)[:, :-1]
        counts_E_3L = hstack([truth_E_L * answer_E_L, answer_E_L, truth_E_L], format="csr")
        return {"accuracy": mean(100 * (truth_E == answer_E)), "macro_f1": Statistics(counts_E_3L, _macro_f1)}

    def table(self, answers: Sequence[str]) -> list[LabelScores]:
        """Scores of each label."""
        from sklearn.metrics import precision_recall_fscore_support  # slow to import

        numbers = range(len(self.labels))
        columns = precision_recall_fscore_support(*self._truths_and_answers(answers), labels=numbers, zero_division=0)
        return [
            LabelScores(label=label, precision=100 * precision, recall=100 * recall, f1=100 * f_score, count=count)
            for label, precision, recall, f_score, count in zip(self.labels, *columns, strict=True)
        ]

    def confusion(self, answers: Sequence[str]) -> Confusion:
        """Counts of the answers to each label's texts."""
        truth_E, answer_E = self._truths_and_answers(answers)
        counts_L_A = self._one_hot(truth_E)[:, :-1].T @ self._one_hot(answer_E)
        return Confusion(labels=self.labels, counts=counts_L_A.toarray().astype(int).tolist())

    def _truths_and_answers(self, answers: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number of the label that each text counts under [E], and of its answer's [E]; L for an answer without one."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        truth_E, answer_E = np.zeros(len(answers), np.int64), np.zeros(len(answers), np.int64)
        for at, (answer, texts) in enumerate(zip(map(str.strip, answers), self._references, strict=False)):
            truth_E[at] = numbers[answer if answer in texts else texts[0]]
            answer_E[at] = numbers.get(answer, len(numbers))
        return truth_E, answer_E

    def _one_hot(self, number_E: NDArray[np.int64]) -> Any:
        """A sparse row for each answer, with a one at its label; the last column is for no label."""
        from scipy.sparse import csr_array  # slow to import

        ones = (np.ones(len(number_E)), number_E, np.arange(len(number_E) + 1))
        return csr_array(ones, shape=(len(number_E), len(self.labels) + 1))


def _macro_f1(sums: Array) -> Array:
    """Mean F1 of the labels that have texts, 0 to 100, from their counts [..., 3 L]."""
    counts_L_3 = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, -1)
    has_texts_L = counts_L_3[..., 2] > 0
    return np.asarray((f1(counts_L_3) * has_texts_L).sum(-1) / has_texts_L.sum(-1))
