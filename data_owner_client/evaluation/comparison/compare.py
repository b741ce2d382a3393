"""The comparison: memories built, rivals trained, each in a process of its own, the test set translated by all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from data_owner_client.data.tasks import Task
from data_owner_client.data.text_metrics import text_scores
from data_owner_client.evaluation.comparison.results import RESAMPLES, ComparisonRow, SystemResult, comparison_rows
from data_owner_client.evaluation.comparison.runner import ComparisonRunner, Connect, Splits
from data_owner_client.evaluation.comparison.systems import SYSTEMS
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.settings import TrainingSettings
from protocol.errors import InvalidData


class Comparison(BaseModel):
    """All systems on one test set."""

    task: str
    model: str
    pairs: dict[str, int]
    signatures: list[str]
    rows: list[ComparisonRow]


def compare(
    connect: Connect,
    task: Task,
    splits: Splits,
    folder: Path,
    *,
    only: Sequence[str] = (),
    settings: TrainingSettings | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Build, train and evaluate what is not there yet; then put all side by side.

    Interrupted, the same call goes on where it was. Rows of other systems, such as the benchmark's LoRA, are taken from
    `folder/rows`.

    Args:
        connect: opens a connection to the server.
        task: of all systems.
        splits: its pairs. The targets of all of them are shown to the PLM's owner, for perplexities and teacher-forced
            contexts.
        folder: for memories, adapters and rows.
        only: names of systems to measure; all unless given.
        settings: of our own systems; the defaults unless given. Those of the rivals are fixed, or tuned.
        reporter: told of the progress.

    Raises:
        InvalidData: a name is none of a system, or a file is damaged.
        PemaError: as building, training and translating.
    """
    reporter = reporter or Reporter()
    with connect() as plm:
        bench = ComparisonRunner(connect, plm, task, splits, folder, settings or TrainingSettings(), reporter)
        unknown = set(only) - set(SYSTEMS)
        if unknown:
            raise InvalidData(f"There is no system {min(unknown)}.", hint=f"There are {', '.join(SYSTEMS)}.")
        for name, (what, measure) in SYSTEMS.items():
            if not only or name in only:
                bench.measure(name, what, measure)
        measured = SystemResult.load_all(folder / "rows")
        order = {name: number for number, name in enumerate(SYSTEMS)}
        rows = comparison_rows(
            sorted(measured.values(), key=lambda one: order.get(one.name, len(order))),
            [pair.target or "" for pair in splits.test],
        )
        sizes = {name: len(part) for name, part in vars(splits).items()}
        scores = text_scores(["a"], ["a"])
        signatures = [f"{one}|bs:{RESAMPLES}" for one in (scores.bleu_signature, scores.chrf_signature)]
        return Comparison(task=task.name, model=plm.card.name, pairs=sizes, signatures=signatures, rows=rows)
