"""The metrics of a task, as results name them."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel

from data_owner_client.data.tasks import Task
from data_owner_client.data.tasks.kinds import Kind
from data_owner_client.scoring.scorer import Metric, Scorer


class TaskMetrics(BaseModel):
    """The metrics of a task.

    Attributes:
        kind: kind of the task, which decides the metrics.
        metrics: the metrics by key, in the order of tables.
        headline: key of the metric whose p-values tables show. `train` chooses by it where texts are decoded.
        signatures: everything that decides the metrics besides the texts, by key of the metric.
    """

    kind: Kind
    metrics: dict[str, Metric]
    headline: str
    signatures: dict[str, str]

    @classmethod
    def of(cls, task: Task, scorer: Scorer) -> Self:
        """The metrics of a task's scorer."""
        return cls(
            kind=task.kind,
            metrics=dict(scorer.metrics),
            headline=scorer.headline,
            signatures=dict(scorer.signatures),
        )
