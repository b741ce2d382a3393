"""Results of a system, and its row in the comparison with the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_owner_client.evaluation.task_metrics import TaskMetrics
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.scoring.scorer import Scorer
from protocol.errors import InvalidData

PLM, CHOSEN_EXAMPLES, PUBLISHED, BEST = "plm", "plm_nearest", "pema_published", "best"
BASELINES = PLM, CHOSEN_EXAMPLES, PUBLISHED
"""Systems that all others are tested against."""


class SystemResult(BaseModel):
    """A system's texts for the test set, and the cost of making the system.

    Attributes:
        name: name of the system, set by the comparison.
        what: description of the system.
        texts: texts of the system, in the order of the test set.
        ppl: perplexity of the references, per token; None if it was not measured.
        train_seconds: duration of training or indexing, without building the memory.
        peak_rss_mb: largest resident memory of the process that trained; None if nothing was trained.
        adapter_bytes: size on the client's disk; None for a system with the model's weights and the texts in one place.
        client_discloses: bytes of the client's texts that the owner sees to build and train; None for a system with the
            model's weights and the texts in one place.
        owner_discloses: bytes of representations and LM-head rows that the client sees; None for a system with the
            model's weights and the texts in one place.
        details: settings that were chosen.
        identity: digest of model, task, pairs and settings, which decide the texts. A row with another one is measured
            again.
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
        """Write the result into a folder."""
        write_atomically(folder / f"{self.name}.json", self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: Path, name: str) -> SystemResult | None:
        """The stored result of a system; None if there is none.

        Raises:
            InvalidData: the file is damaged.
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
        """All stored results, by name.

        Raises:
            InvalidData: a file is damaged.
        """
        names = [path.stem for path in sorted(folder.glob("*.json"))]
        return {name: result for name in names if (result := cls.load(folder, name)) is not None}


class ComparisonRow(BaseModel):
    """Scores of one system in the comparison.

    Fields without a description are those of `SystemResult`.

    Attributes:
        scores: scores by key of the metric.
        p_values: p-values of the difference from each of `BASELINES` that was measured, by name of the baseline and key
            of the metric, from paired bootstrap resampling of the test set; a baseline has none against itself.
    """

    name: str
    what: str
    scores: dict[str, float]
    p_values: dict[str, dict[str, float]]
    ppl: float | None
    train_seconds: float
    peak_rss_mb: float | None
    adapter_bytes: int | None
    client_discloses: int | None
    owner_discloses: int | None
    details: dict[str, Any]


class Comparison(TaskMetrics):
    """Scores of all systems on one test set.

    Attributes:
        task: name of the task.
        model: name of the PLM.
        pairs: number of pairs of each split, by name.
        rows: a row for each system.
    """

    task: str
    model: str
    pairs: dict[str, int]
    rows: list[ComparisonRow]

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines that were measured."""
        measured = {row.name for row in self.rows}
        return [name for name in BASELINES if name in measured]


def comparison_rows(results: Sequence[SystemResult], texts: int, scorer: Scorer) -> list[ComparisonRow]:
    """Scores of all systems, with the significance of their differences from the baselines.

    Args:
        results: answers of the systems.
        texts: number of texts in the test set.
        scorer: scores the answers to these texts.

    Raises:
        InvalidData: a system does not have one answer to each text.
    """
    for result in results:
        if len(result.texts) != texts:
            raise InvalidData(
                f"{result.name} has {len(result.texts)} answers to {texts} texts.",
                hint="It belongs to another test set: delete its row and measure it again.",
            )
    p_values = {baseline: _p_values(baseline, results, scorer) for baseline in BASELINES}
    shared = set(SystemResult.model_fields) & set(ComparisonRow.model_fields)
    return [
        ComparisonRow(
            **result.model_dump(include=shared),
            scores=scorer.scores(result.texts),
            p_values={
                baseline: of_system[result.name] for baseline, of_system in p_values.items() if result.name in of_system
            },
        )
        for result in results
    ]


def _p_values(baseline: str, results: Sequence[SystemResult], scorer: Scorer) -> dict[str, dict[str, float]]:
    """The p-values of every other system's difference from the baseline, by metric; empty without the baseline."""
    answers = {result.name: result.texts for result in results}
    others = {name: texts for name, texts in answers.items() if name != baseline}
    if baseline not in answers or not others:
        return {}
    return dict(zip(others, scorer.p_values(answers[baseline], list(others.values())), strict=True))
