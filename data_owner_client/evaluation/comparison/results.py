"""What is measured of a system, and what follows from it beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu
from pydantic import BaseModel, ConfigDict, ValidationError
from sacrebleu.significance import PairedTest

from data_owner_client.data.text_metrics import text_scores
from data_owner_client.runtime.atomic_files import write_atomically
from protocol.errors import InvalidData

PLM, PUBLISHED, BEST = "plm", "pema_published", "best"
RESAMPLES = 1000


class SystemResult(BaseModel):
    """One system's answers to the test set, and what it cost to make it.

    Attributes:
        name: of the system; the comparison gives it.
        what: it in words.
        texts: its answers, in the order of the test set.
        ppl: perplexity of the references, per token.
        train_seconds: of training or indexing, the memory not counted.
        peak_rss_mb: largest resident memory of the process that trained.
        adapter_bytes: on the client's disk.
        client_discloses: bytes of the client's texts that the owner sees to build and train.
        owner_discloses: bytes of representations and LM-head rows that the client sees. None, like the two before, for
            a system that needs the model's weights and the texts in one place: there are no two sides then.
        details: what was chosen.
        identity: of all that decides the answers; a row of something else is measured again.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    what: str = ""
    texts: list[str]
    ppl: float | None = None
    train_seconds: float = 0.0
    peak_rss_mb: float | None = None
    adapter_bytes: int | None = None
    client_discloses: int | None = None
    owner_discloses: int | None = None
    details: dict[str, Any] = {}
    identity: str | None = None

    def save(self, folder: Path) -> None:
        """Keep it for the comparison."""
        write_atomically(folder / f"{self.name}.json", self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: Path, name: str) -> SystemResult | None:
        """What is kept of a system; None if nothing is.

        Raises:
            InvalidData: its file is damaged.
        """
        path = folder / f"{name}.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise InvalidData(f"{path} is damaged.", hint="Delete it and run this again.") from error

    @classmethod
    def load_all(cls, folder: Path) -> dict[str, SystemResult]:
        """All that is kept, by name.

        Raises:
            InvalidData: a file is damaged.
        """
        names = [path.stem for path in sorted(folder.glob("*.json"))]
        return {name: one for name in names if (one := cls.load(folder, name)) is not None}


class ComparisonRow(BaseModel):
    """One system beside the others.

    Attributes:
        name: of the system.
        what: it in words.
        bleu: sacrebleu's.
        chrf: sacrebleu's.
        p_value_bleu_vs_plm: of the difference, by paired bootstrap resampling of the test set; likewise the others.
        ppl: and what follows: see `SystemResult`.
    """

    name: str
    what: str
    bleu: float
    chrf: float
    ppl: float | None
    train_seconds: float
    peak_rss_mb: float | None
    adapter_bytes: int | None
    client_discloses: int | None
    owner_discloses: int | None
    p_value_bleu_vs_plm: float | None
    p_value_chrf_vs_plm: float | None
    p_value_bleu_vs_published: float | None
    p_value_chrf_vs_published: float | None
    details: dict[str, Any]


def comparison_rows(measured: Sequence[SystemResult], references: Sequence[str]) -> list[ComparisonRow]:
    """Scores of all systems, with the significance of their differences from the PLM and from PEMA as published.

    Raises:
        InvalidData: a system has not answered every text.
    """
    for one in measured:
        if len(one.texts) != len(references):
            raise InvalidData(
                f"{one.name} has {len(one.texts)} answers to {len(references)} texts.",
                hint="It belongs to another test set: delete its row and measure it again.",
            )
    p_values = {base: _p_values(base, measured, references) for base in (PLM, PUBLISHED)}
    shared = set(SystemResult.model_fields) & set(ComparisonRow.model_fields)
    rows = []
    for one in measured:
        scores = text_scores(one.texts, references)
        against_plm, against_published = (p_values[base].get(one.name, {}) for base in (PLM, PUBLISHED))
        rows.append(
            ComparisonRow(
                **one.model_dump(include=shared),
                bleu=scores.bleu,
                chrf=scores.chrf,
                p_value_bleu_vs_plm=against_plm.get("BLEU"),
                p_value_chrf_vs_plm=against_plm.get("chrF2"),
                p_value_bleu_vs_published=against_published.get("BLEU"),
                p_value_chrf_vs_published=against_published.get("chrF2"),
            )
        )
    return rows


def _p_values(
    baseline: str, measured: Sequence[SystemResult], references: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """For every system and metric the p-value of its difference from the baseline; nothing without the baseline."""
    systems = sorted(measured, key=lambda one: one.name != baseline)
    if not systems or systems[0].name != baseline or len(systems) < 2:
        return {}
    metrics = {
        "BLEU": sacrebleu.BLEU(references=[list(references)]),
        "chrF2": sacrebleu.CHRF(references=[list(references)]),
    }
    test = PairedTest(
        [(one.name, one.texts) for one in systems],
        metrics,
        references=None,
        test_type="bs",
        n_samples=RESAMPLES,
    )
    _, results = test()
    return {
        one.name: {metric: results[metric][at].p_value for metric in metrics} for at, one in enumerate(systems) if at
    }
