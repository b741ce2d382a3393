"""`pema-client evaluate` and `compare`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from cyclopts import Parameter

from data_owner_client.cli.app import command, set_threads
from data_owner_client.cli.inputs import pairs_of
from data_owner_client.cli.options import (
    DATA,
    DEFAULT_OPTIONS,
    DEFAULT_SERVER,
    OUTPUT,
    AsJson,
    Connection,
    Decoding,
    Dtype,
    InputFile,
    MoreDecoding,
    OptionalAdapter,
    PathOption,
    Reading,
    Scoring,
    Server,
    ShareEarlierAnswers,
    ShareTargets,
    Sources,
    Targets,
    TaskName,
    Threads,
    Training,
    connected,
)
from data_owner_client.data.reading.settings import DEFAULT_READING
from data_owner_client.decoding.settings import DEFAULT_DECODING
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION
from data_owner_client.scoring.settings import DEFAULT_SCORING
from data_owner_client.training.settings import DEFAULT_TRAINING
from protocol.errors import InvalidData

if TYPE_CHECKING:
    from data_owner_client.data.pair_files import PairFile
    from data_owner_client.data.reading.settings import ReadingSettings
    from data_owner_client.data.tasks import Task
    from data_owner_client.evaluation.details import Details


@command()
def evaluate(
    *,
    adapter_folder: OptionalAdapter = None,
    input_file: InputFile = None,
    sources: Sources = None,
    targets: Targets = None,
    hypotheses: Annotated[
        PathOption | None,
        Parameter(help="Score this text file, one hypothesis a line, instead of translating.", group=DATA),
    ] = None,
    task: Annotated[
        str | None,
        Parameter(help="Task of --hypotheses, whose metrics are used. Default: rewriting, with BLEU.", group=DATA),
    ] = None,
    reading: Reading = DEFAULT_READING,
    options: MoreDecoding = DEFAULT_OPTIONS,
    decoding: Decoding = DEFAULT_DECODING,
    scoring: Scoring = DEFAULT_SCORING,
    picture: Annotated[
        PathOption | None, Parameter(help="PNG file for the confusions of a classify task's labels.", group=OUTPUT)
    ] = None,
    as_json: AsJson = False,
    threads: Threads = 0,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
    dtype: Dtype = "float16",
    share_targets: ShareTargets = False,
    share_earlier_answers: ShareEarlierAnswers = False,
) -> None:
    """Score the PLM alone and with the adapter by the metrics of the task's kind, and by perplexity.

    The metrics are computed on this machine. Perplexity needs the PLM's view of the references themselves, which shows
    them to its owner: hence --share-targets. Without it, the first answer of each conversation is scored, because the
    prompts for later ones show it; see --share-earlier-answers.

    Examples:

    - `pema-client evaluate --adapter adapter --input test.jsonl --share-targets`
    - `pema-client evaluate --adapter adapter --input test.jsonl --effort medium --json`
    - `pema-client evaluate --sources test.en --targets test.de --hypotheses test.out`
    - `pema-client evaluate --task intents.toml --input test.jsonl --hypotheses test.out --picture confusions.png`
    """
    from data_owner_client.adapter.trained import TrainedAdapter
    from data_owner_client.cli.output import print_record
    from data_owner_client.cli.score_tables import print_evaluation, print_scores
    from data_owner_client.data.checking.report import counted
    from data_owner_client.data.tasks import Task, load_task
    from data_owner_client.evaluation.evaluate import evaluate as evaluate_systems
    from data_owner_client.evaluation.evaluate import score_answers
    from data_owner_client.runtime.progress_display import stderr_reporter

    set_threads(threads)
    if hypotheses is not None:
        _require_hypotheses_alone(adapter_folder, reading)
        loaded = load_task(task) if task else Task(name="rewrite")
        _require_labels(picture, loaded)
        pairs = pairs_of(input_file, sources, targets, reading)
        scores = score_answers(loaded, pairs, _hypotheses_for(pairs, hypotheses), scoring)
        if as_json:
            print_record(scores.model_dump(), as_json, title="")
        else:
            print_scores(scores, title=str(hypotheses))
        _draw(picture, f"{loaded.name}, {hypotheses}", scores.details)
        return
    if adapter_folder is None:
        raise InvalidData("There is nothing to evaluate.", hint="Give --adapter, or --hypotheses to score a file.")
    if task is not None:
        raise InvalidData("The adapter has its own task.", hint="Leave --task away: it goes with --hypotheses.")
    adapter = TrainedAdapter.load(adapter_folder)
    _require_labels(picture, adapter.card.task)
    pairs = pairs_of(input_file, sources, targets, reading)
    with connected(server, connection, dtype) as plm:
        evaluation = evaluate_systems(
            plm,
            pairs,
            adapter,
            interpolation=options.interpolation(adapter),
            share_targets=share_targets,
            share_earlier_answers=share_earlier_answers,
            decoding=decoding,
            lookup=options.drafter(),
            consensus=options.consensus,
            beams=options.beams,
            length_penalty=options.length_penalty,
            effort=options.effort,
            scoring=scoring,
            skip_invalid=reading.skip_invalid,
            reporter=stderr_reporter(),
        )
    title = counted(len(evaluation.sources), "pair")
    if as_json:
        print_record(evaluation.model_dump(), as_json, title="")
    else:
        print_evaluation(evaluation, title=title)
    _draw(picture, f"{adapter.card.task.name}, {title}", evaluation.pema_details)


@command()
def compare(
    *,
    input_file: Annotated[PathOption, Parameter(name="--input", help="Pairs to train on.", group=DATA)],
    validation: Annotated[PathOption, Parameter(help="Pairs held out for validation.", group=DATA)],
    test: Annotated[PathOption, Parameter(help="Pairs to evaluate on.", group=DATA)],
    task: TaskName = "translate-en-de",
    only: Annotated[
        list[str] | None,
        Parameter(help="Measure only this system, such as plm or best. A wrong name lists all.", group=DATA),
    ] = None,
    reading: Reading = DEFAULT_READING,
    settings: Training = DEFAULT_TRAINING,
    consensus: Annotated[
        int,
        Ge(0),
        Parameter(help="Texts that PEMA's own systems draw for a consensus; 0 for none, a ninth of the decoding."),
    ] = 8,
    scoring: Scoring = DEFAULT_SCORING,
    folder: Annotated[
        PathOption, Parameter(help="Folder for the results, and below it memories and adapters.", group=OUTPUT)
    ] = Path("runs/compare"),
    as_json: AsJson = False,
    threads: Threads = 0,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
    share_targets: ShareTargets = False,
) -> None:
    """Train and evaluate PEMA and its baselines on one memory and one test set.

    Writes TASK.json, TASK.md and TASK.png into the folder. Needs --share-targets: teacher-forced memories and
    perplexities show all targets to the owner of the PLM. Interrupted, the same command goes on where it stopped.

    Examples:

    - `pema-client compare --input train.jsonl --validation dev.jsonl --test test.jsonl --share-targets`
    - `pema-client compare --input a.jsonl --validation b.jsonl --test c.jsonl --share-targets --only plm --only best`
    """
    from data_owner_client.cli.output import print_record
    from data_owner_client.cli.score_tables import print_comparison
    from data_owner_client.data.reading.reader import spool_pairs
    from data_owner_client.data.tasks import load_task
    from data_owner_client.evaluation.comparison import report
    from data_owner_client.evaluation.comparison.compare import compare as compare_systems
    from data_owner_client.evaluation.comparison.runner import Splits
    from data_owner_client.runtime.atomic_files import write_atomically
    from data_owner_client.runtime.progress_display import stderr_reporter

    if not share_targets:
        raise InvalidData(
            "Most systems of a comparison show the targets to the owner of the PLM.",
            hint="Say --share-targets if you want that; compare with public data if you do not.",
        )
    set_threads(threads)
    splits = Splits(*(spool_pairs(path, reading) for path in (input_file, validation, test)))
    loaded = load_task(task)
    result = compare_systems(
        partial(connected, server, connection),  # trainings in child processes connect with it, too
        loaded,
        splits,
        folder / loaded.name,
        only=only or (),
        settings=settings,
        consensus=consensus,
        scoring=scoring,
        skip_invalid=reading.skip_invalid,
        reporter=stderr_reporter(),
    )
    write_atomically(folder / f"{result.task}.md", report.markdown(result).encode())
    write_atomically(folder / f"{result.task}.json", f"{result.model_dump_json(indent=1)}\n".encode())
    report.draw(result, folder / f"{result.task}.png")
    if as_json:
        print_record(result.model_dump(), as_json, title="")
    else:
        print_comparison(result, title=report.title_of(result))


def _require_hypotheses_alone(adapter_folder: Path | None, reading: ReadingSettings) -> None:
    if reading.skip_invalid:
        raise InvalidData(
            "With --hypotheses no pair can be left out: they belong to the references by their order.",
            hint="Leave --skip-invalid away.",
        )
    if adapter_folder is not None:
        raise InvalidData(
            "--hypotheses has the texts to score, so no adapter is used.",
            hint="Leave --adapter away; --task names the task whose metrics are used.",
        )


def _require_labels(picture: Path | None, task: Task) -> None:
    """Refuse a picture of labels before the long work, if the task has none."""
    if picture is not None and task.kind != "classify":
        raise InvalidData(
            f"--picture draws the confusions of labels, and the task {task.name} is of the kind {task.kind}.",
            hint="Leave --picture away.",
        )


def _hypotheses_for(pairs: PairFile, path: Path) -> list[str]:
    """The hypotheses of a file, one for each pair."""
    from data_owner_client.data.reading.reader import read_hypotheses

    lines = read_hypotheses(path)
    if len(lines) != len(pairs):
        raise InvalidData(f"{path} has {len(lines)} lines for {len(pairs)} references.", hint="One each.")
    return lines


def _draw(picture: Path | None, title: str, details: Details | None) -> None:
    from data_owner_client.evaluation.details import ClassificationDetails
    from data_owner_client.scoring.confusion_picture import draw_confusion

    if picture is not None and isinstance(details, ClassificationDetails):
        draw_confusion(title, details.confusion, picture)
