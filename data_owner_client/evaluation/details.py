"""Details of answers that only one kind of task has: tables of labels or fields, confusions, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from data_owner_client.scoring.calibration import Calibration, calibration
from data_owner_client.scoring.classification import ClassificationScorer, Confusion, LabelScores
from data_owner_client.scoring.extraction import ExtractionScorer, FieldScores
from data_owner_client.scoring.scorer import References, Scorer


class ClassificationDetails(BaseModel):
    """Details of labels.

    Attributes:
        labels: scores of each label.
        confusion: how often each label was answered with each label.
        calibration: calibration of the labels' probabilities; None if these are not known.
    """

    labels: list[LabelScores]
    confusion: Confusion
    calibration: Calibration | None


class ExtractionDetails(BaseModel):
    """Details of structured answers.

    Attributes:
        fields: scores of each field.
    """

    fields: list[FieldScores]


Details = ClassificationDetails | ExtractionDetails
"""Details of one kind of task."""


def details_of(
    scorer: Scorer,
    references: Sequence[References],
    answers: Sequence[str],
    label_probabilities: Sequence[Mapping[str, float]] | None = None,
) -> Details | None:
    """The details that the scorer's kind of task has; None if it has none.

    Args:
        scorer: scorer of the task.
        references: accepted answers to the texts.
        answers: the answers.
        label_probabilities: for each text, the probability of each label; empty for texts without an answer. None if
            they are not known.
    """
    if isinstance(scorer, ExtractionScorer):
        return ExtractionDetails(fields=scorer.table(answers))
    if not isinstance(scorer, ClassificationScorer):
        return None
    known = [pair for pair in zip(label_probabilities or (), references, strict=False) if pair[0]]
    return ClassificationDetails(
        labels=scorer.table(answers),
        confusion=scorer.confusion(answers),
        calibration=calibration([each for each, _ in known], [texts for _, texts in known]) if known else None,
    )
