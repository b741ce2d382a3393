"""Comparison on one test set: build memories, train each system in a separate process, translate, score."""

from __future__ import annotations

from collections.abc import Sequence

from data_owner_client.data.earlier_answers import first_answers
from data_owner_client.data.tasks import Task
from data_owner_client.evaluation.comparison.results import Comparison, SystemResult, comparison_rows
from data_owner_client.evaluation.comparison.runner import ComparisonRunner, Connect, Splits, comparison_task
from data_owner_client.evaluation.comparison.systems import SYSTEMS, draws_for, systems_for
from data_owner_client.evaluation.task_metrics import TaskMetrics
from data_owner_client.memory.usable_pairs import require_usable
from data_owner_client.runtime.arguments import AnyPath, to_path
from data_owner_client.runtime.progress import Reporter
from data_owner_client.scoring.scorers import references_of, scorer_for
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings
from data_owner_client.training.settings import TrainingSettings
from protocol.errors import InvalidData


def compare(
    connect: Connect,
    task: Task,
    splits: Splits,
    folder: AnyPath,
    *,
    only: Sequence[str] = (),
    settings: TrainingSettings | None = None,
    consensus: int = 8,
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
        consensus: texts drawn for each source by PEMA's own systems, of which the most typical one counts; 0 for none.
        scoring: settings of the scores.
        skip_invalid: leave out pairs that cannot be used, and log how many there are.
        reporter: shows the progress.

    Raises:
        InvalidData: pairs cannot be used, a name is not that of a system, a file is damaged, or the tokenizer of BLEU
            is not installed.
        PemaError: a call to the PLM failed.
    """
    folder, reporter = to_path(folder), reporter or Reporter()
    systems = systems_for(task, only, consensus, reporter)
    with connect() as plm:
        task = comparison_task(task, plm, splits, folder)
        # The last systems, which are private, need their pairs after hours.
        parts, private = list(vars(splits).values()), any(name.startswith("private") for name in systems)
        splits = Splits(
            *require_usable(plm, task, parts, drafted=private, skip_invalid=skip_invalid, reporter=reporter)
        )
        if private and not (first_answers(splits.train) and first_answers(splits.validation)):
            raise InvalidData(
                "Private memories learn the first answer of each conversation, and a file has later ones alone.",
                hint="Give conversations from their beginning, or leave the private systems out with --only.",
            )
        settings, draws = settings or TrainingSettings(), draws_for(task, consensus)
        runner = ComparisonRunner(connect, plm, task, splits, folder, settings, draws, reporter)
        scorer = scorer_for(task, [references_of(pair, task, plm.tokenizer) for pair in splits.test], scoring)
        for name, system in systems.items():
            runner.measure(name, system.what, system.measure, fixed_settings=system.fixed_settings)
        results = SystemResult.load_all(folder / "rows")
        order = {name: number for number, name in enumerate(SYSTEMS)}
        rows = comparison_rows(
            sorted(results.values(), key=lambda result: order.get(result.name, len(order))), len(splits.test), scorer
        )
        return Comparison(
            **vars(TaskMetrics.of(task, scorer)),
            task=task.name,
            model=plm.card.name,
            pairs={name: len(part) for name, part in vars(splits).items()},
            rows=rows,
        )
