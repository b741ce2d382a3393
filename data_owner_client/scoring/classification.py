"""Scores of labels: accuracy, macro-F1, a table of the labels and their confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
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
        self.labels = list(dict.fromkeys([*labels, *sorted({texts[0] for texts in references})]))

    def each(self, answers: Sequence[str]) -> Tensor:
        """100 for each right answer and 0 for each other [E], float64."""
        truths_E, answers_E = self._truths_and_answers(answers)
        return torch.tensor([100.0 * (a == b) for a, b in zip(truths_E, answers_E, strict=True)], dtype=torch.float64)

    def statistics(self, answers: Sequence[str]) -> dict[str, Statistics]:
        truths_E, answers_E = self._truths_and_answers(answers)
        truth_E_L, answer_E_L = self._one_hot(truths_E), self._one_hot(answers_E)
        counts_E_3_L = np.stack([truth_E_L * answer_E_L, answer_E_L, truth_E_L], axis=1)
        return {
            "accuracy": mean(100 * (truth_E_L * answer_E_L).sum(-1)),
            "macro_f1": Statistics(counts_E_3_L.reshape(len(answers), -1), _macro_f1),
        }

    def table(self, answers: Sequence[str]) -> list[LabelScores]:
        """Scores of each label."""
        from sklearn.metrics import precision_recall_fscore_support  # slow to import

        columns = precision_recall_fscore_support(
            *self._truths_and_answers(answers), labels=self.labels, zero_division=0
        )
        return [
            LabelScores(label=label, precision=100 * precision, recall=100 * recall, f1=100 * f_score, count=count)
            for label, precision, recall, f_score, count in zip(self.labels, *columns, strict=True)
        ]

    def confusion(self, answers: Sequence[str]) -> Confusion:
        """Counts of the answers to each label's texts."""
        truths_E, answers_E = self._truths_and_answers(answers)
        counts_L_A = self._one_hot(truths_E).T @ self._one_hot(answers_E, with_other=True)
        return Confusion(labels=self.labels, counts=counts_L_A.astype(int).tolist())

    def _truths_and_answers(self, answers: Sequence[str]) -> tuple[list[str], list[str]]:
        """The label that each text counts under, and its answer."""
        answers_E = [answer.strip() for answer in answers]
        pairs = zip(answers_E, self._references, strict=False)
        return [answer if answer in texts else texts[0] for answer, texts in pairs], answers_E

    def _one_hot(self, answers: Sequence[str], *, with_other: bool = False) -> Array:
        """One row for each answer, with a one at its label, and on request a last column for no label."""
        index = {label: number for number, label in enumerate(self.labels)}
        hot_E_A = np.eye(len(self.labels) + 1)[[index.get(answer, len(self.labels)) for answer in answers]]
        return hot_E_A if with_other else hot_E_A[:, :-1]


def _macro_f1(sums: Array) -> Array:
    """Mean F1 of the labels that have texts, 0 to 100, from their counts [..., 3 L]."""
    counts_L_3 = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, -1)
    has_texts_L = counts_L_3[..., 2] > 0
    return np.asarray((f1(counts_L_3) * has_texts_L).sum(-1) / has_texts_L.sum(-1))
