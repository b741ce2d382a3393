"""Comparison on one test set: build memories, train each system in a separate process, translate, score."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from data_owner_client.data.tasks import Task
from data_owner_client.evaluation.comparison.results import RESAMPLES, ComparisonRow, SystemResult, comparison_rows
from data_owner_client.evaluation.comparison.runner import ComparisonRunner, Connect, Splits
from data_owner_client.evaluation.comparison.systems import SYSTEMS
from data_owner_client.memory.usable_pairs import require_usable
from data_owner_client.runtime.arguments import AnyPath, to_path
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings
from data_owner_client.scoring.text_metrics import bleu_tokenizer, text_scores
from data_owner_client.training.settings import TrainingSettings
from protocol.errors import InvalidData


class Comparison(BaseModel):
    """Scores of all systems on one test set.

    Attributes:
        task: name of the task.
        model: name of the PLM.
        pairs: number of pairs of each split, by name.
        signatures: sacrebleu's signatures of the metrics.
        rows: a row for each system.
    """

    task: str
    model: str
    pairs: dict[str, int]
    signatures: list[str]
    rows: list[ComparisonRow]


def compare(
    connect: Connect,
    task: Task,
    splits: Splits,
    folder: AnyPath,
    *,
    only: Sequence[str] = (),
    settings: TrainingSettings | None = None,
    scoring: ScoringSettings = DEFAULT_SCORING,
    skip_invalid: bool = False,
    reporter: Reporter | None = None,
) -> Comparison:
    """Measure every system that has no row yet, and return the rows of all.

    After an interruption, the same call goes on where it was. Rows of further systems, such as the benchmark's LoRA,
    are read from `folder/rows`.

    Args:
        connect: opens a connection to the server.
        task: task of all systems.
        splits: pairs of the task. The PLM's owner sees all their targets, for perplexities and teacher-forced contexts.
        folder: folder for memories, adapters and rows.
        only: names of the systems to measure; empty for all.
        settings: training settings of PEMA's own systems; None for the defaults. Those of baselines are fixed or tuned.
        scoring: settings of the scores.
        skip_invalid: leave out pairs that cannot be used, and log how many there are.
        reporter: shows the progress.

    Raises:
        InvalidData: pairs cannot be used, a name is not that of a system, a file is damaged, or the tokenizer of BLEU
            is not installed.
        PemaError: a call to the PLM failed.
    """
    folder, reporter = to_path(folder), reporter or Reporter()
    unknown = set(only) - set(SYSTEMS)
    if unknown:
        raise InvalidData(f"There is no system {min(unknown)}.", hint=f"There are {', '.join(SYSTEMS)}.")
    with connect() as plm:
        # The last system needs its pairs after hours.
        parts, drafted = list(vars(splits).values()), any(name.startswith("private") for name in only or SYSTEMS)
        splits = Splits(
            *require_usable(plm, task, parts, drafted=drafted, skip_invalid=skip_invalid, reporter=reporter)
        )
        references = [pair.target or "" for pair in splits.test]
        tokenizer = bleu_tokenizer(references, scoring)
        runner = ComparisonRunner(connect, plm, task, splits, folder, settings or TrainingSettings(), reporter)
        for name, (what, measure) in SYSTEMS.items():
            if not only or name in only:
                runner.measure(name, what, measure)
        results = SystemResult.load_all(folder / "rows")
        order = {name: number for number, name in enumerate(SYSTEMS)}
        rows = comparison_rows(
            sorted(results.values(), key=lambda result: order.get(result.name, len(order))),
            references,
            tokenizer,
        )
        sizes = {name: len(part) for name, part in vars(splits).items()}
        scores = text_scores(["a"], ["a"], tokenizer)
        signatures = [f"{signature}|bs:{RESAMPLES}" for signature in (scores.bleu_signature, scores.chrf_signature)]
        return Comparison(task=task.name, model=plm.card.name, pairs=sizes, signatures=signatures, rows=rows)
