"""Rows of a sweep: settings, scores, and their CSV form."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter, model_serializer, model_validator

from data_owner_client.adapter.types import Schedule
from data_owner_client.runtime.declared_settings import varied_names
from data_owner_client.training.settings import TrainingSettings

SETTINGS = varied_names(TrainingSettings)
"""Names of the training settings that a grid may vary."""


class SweepRow(BaseModel):
    """One point of the grid; as JSON and CSV one flat record, with the settings that a grid may vary.

    Attributes:
        settings: settings of the training.
        examples: pairs of the memory that it was trained on.
        schedule: schedule of λ.
        lambda_max: λ_max of the schedule.
        nll: negative log-likelihood of the mixture on the held-out pairs, in nats per token.
        plm_nll: negative log-likelihood of the PLM alone, in nats per token.
        train_seconds: duration of the training, which several interpolations share.
    """

    settings: TrainingSettings
    examples: int
    schedule: Schedule
    lambda_max: float
    nll: float
    plm_nll: float
    train_seconds: float

    def value(self, name: str) -> Any:
        """The value of a column: of a setting that a grid may vary, or of another field."""
        return getattr(self.settings if name in SETTINGS else self, name)

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {name: self.value(name) for name in columns()}

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, record: Any) -> Any:
        if not isinstance(record, dict) or "settings" in record:
            return record
        return record | {"settings": {name: record[name] for name in SETTINGS if name in record}}


def columns() -> list[str]:
    """The columns of the CSV file, settings first."""
    return [*SETTINGS, *(name for name in SweepRow.model_fields if name != "settings")]


ROWS = TypeAdapter(list[SweepRow])


def likeliest(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The likeliest interpolation of every training, the best training first."""
    best: dict[tuple[object, ...], SweepRow] = {}
    for row in rows:
        training = (row.settings, row.examples)
        if training not in best or row.nll < best[training].nll:
            best[training] = row
    return sorted(best.values(), key=lambda row: row.nll)


def as_csv(rows: Sequence[SweepRow]) -> str:
    """Return the rows as CSV text with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()
