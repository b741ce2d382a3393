"""Rows of a sweep: settings, scores, and their CSV form."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pydantic import BaseModel, TypeAdapter

from data_owner_client.adapter.types import AdapterForm, Schedule

SETTINGS = (
    "form",
    "rank",
    "kappa",
    "learning_rate",
    "dropout",
    "reconstruction_epochs",
    "epochs",
    "ema_decay",
    "seed",
)


"""Names of the training settings that a grid may vary."""


class SweepRow(BaseModel):
    """One point of the grid.

    Attributes:
        nll: of the mixture on the held-out pairs, in nats per token.
        plm_nll: of the PLM alone.
        train_seconds: of its training, which it shares with other interpolations.
    """

    form: AdapterForm
    rank: int
    kappa: float
    learning_rate: float
    dropout: float
    reconstruction_epochs: int
    epochs: int
    ema_decay: float
    seed: int
    examples: int
    schedule: Schedule
    lambda_max: float
    nll: float
    plm_nll: float
    train_seconds: float


ROWS = TypeAdapter(list[SweepRow])


def likeliest(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Of every training its likeliest interpolation, the best training first."""
    best: dict[tuple[object, ...], SweepRow] = {}
    for row in rows:
        training = (*(getattr(row, name) for name in SETTINGS), row.examples)
        if training not in best or row.nll < best[training].nll:
            best[training] = row
    return sorted(best.values(), key=lambda row: row.nll)


def as_csv(rows: Sequence[SweepRow]) -> str:
    """Return the rows as CSV text with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(SweepRow.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()
