"""`pema-client evaluate` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.cli.app import command, set_threads
from data_owner_client.cli.inputs import pairs_of
from data_owner_client.cli.options import (
    AsJson,
    Decoded,
    DecodingOptions,
    FileFormat,
    InputFile,
    Minutes,
    OptionalAdapter,
    ServerOptions,
    ShareTargets,
    SourceField,
    Sources,
    TargetField,
    Targets,
    Threads,
)
from data_owner_client.cli.output import print_record
from data_owner_client.data.pairs import read_lines, read_pairs
from data_owner_client.data.tasks import load_task
from data_owner_client.data.text_metrics import text_scores
from data_owner_client.evaluation.comparison import report
from data_owner_client.evaluation.comparison.compare import compare as compare_systems
from data_owner_client.evaluation.comparison.runner import Splits
from data_owner_client.evaluation.comparison.systems import SYSTEMS
from data_owner_client.evaluation.evaluate import evaluate as evaluate_systems
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.progress import RichReporter
from data_owner_client.training.settings import TrainingSettings
from protocol.errors import InvalidData


@command()
def evaluate(
    server: ServerOptions,
    decoding: DecodingOptions,
    adapter: OptionalAdapter = None,
    input_file: InputFile = None,
    sources: Sources = None,
    targets: Targets = None,
    hypotheses: Annotated[
        Path | None, typer.Option(help="Score this text file, one hypothesis a line, instead of translating.")
    ] = None,
    share_targets: ShareTargets = False,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    target_field: TargetField = "target",
    as_json: AsJson = False,
) -> None:
    """Score the PLM alone and with the adapter: BLEU, chrF and, with --share-targets, perplexity.

    BLEU and chrF are computed on this machine. Perplexity needs the PLM's view of the references themselves, which
    shows them to its owner: hence the flag.

    Examples:

    - `pema-client evaluate --adapter adapter --input test.jsonl --share-targets`
    - `pema-client evaluate --sources test.en --targets test.de --hypotheses test.out`
    """
    set_threads(decoding.threads)
    pairs = pairs_of(input_file, sources, targets, file_format, source_field=source_field, target_field=target_field)
    if hypotheses is not None:
        lines = read_lines(hypotheses)
        if len(lines) != len(pairs):
            raise InvalidData(f"{hypotheses} has {len(lines)} lines for {len(pairs)} references.", hint="One each.")
        scores = text_scores(lines, [pair.target or "" for pair in pairs])
        print_record(scores.model_dump(), as_json, title=str(hypotheses))
        return
    if adapter is None:
        raise InvalidData("There is nothing to evaluate.", hint="Give --adapter, or --hypotheses to score a file.")
    trained = TrainedAdapter.load(adapter)
    with server.connect(decoding.dtype) as plm:
        report = evaluate_systems(
            plm,
            pairs,
            trained,
            interpolation=decoding.interpolation(trained),
            share_targets=share_targets,
            decoding=decoding.settings,
            lookup=decoding.drafts(),
            consensus=decoding.consensus,
            reporter=RichReporter(),
        )
    if as_json:
        print_record(report.model_dump(), as_json, title="")
        return
    table = Table("", "BLEU", "chrF", "perplexity", title=f"{len(pairs)} pairs")
    perplexity = report.perplexity
    for name, scores, ppl in (
        ("PLM alone", report.plm, perplexity and perplexity.plm),
        ("PLM + adapter", report.pema, perplexity and perplexity.mixture),
    ):
        table.add_row(name, f"{scores.bleu:.1f}", f"{scores.chrf:.1f}", "–" if ppl is None else f"{ppl:.2f}")
    if perplexity is not None:
        covered = f"the {perplexity.coverage:.1%} of tokens that it covers"
        if perplexity.pema_covered is not None:
            table.caption = f"Perplexity of the adapter alone, on {covered}: {perplexity.pema_covered:.2f}."
    Console().print(table)
    Console().print(report.pema.bleu_signature, report.pema.chrf_signature, sep="\n", highlight=False)


@command()
def compare(
    server: ServerOptions,
    input_file: Annotated[Path, typer.Option("--input", help="Pairs to train on.")],
    validation: Annotated[Path, typer.Option(help="Pairs held out for validation.")],
    test: Annotated[Path, typer.Option(help="Pairs to evaluate on.")],
    task: Annotated[str, typer.Option(help="Name of a built-in task, or a TOML file.")] = "translate-en-de",
    folder: Annotated[Path, typer.Option(help="For the results, and below it memories and adapters.")] = Path(
        "runs/compare"
    ),
    only: Annotated[list[str] | None, typer.Option(help=f"Measure only this system: {', '.join(SYSTEMS)}.")] = None,
    minutes: Minutes = TrainingSettings.minutes,
    decoded: Decoded = TrainingSettings.decoded,
    share_targets: ShareTargets = False,
    source_field: SourceField = "source",
    target_field: TargetField = "target",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate PEMA, ours and its rivals on one memory and one test set.

    Writes TASK.json, TASK.md and TASK.png into the folder. Needs --share-targets: teacher-forced memories and
    perplexities show all targets to the owner of the PLM. Interrupted, the same command goes on where it stopped.

    Examples:

    - `pema-client compare --input train.jsonl --validation dev.jsonl --test test.jsonl --share-targets`
    - `pema-client compare --input a.jsonl --validation b.jsonl --test c.jsonl --share-targets --only plm --only best`
    """
    if not share_targets:
        raise InvalidData(
            "Most systems of a comparison show the targets to the owner of the PLM.",
            hint="Say --share-targets if you want that; compare with public data if you do not.",
        )
    set_threads(threads)
    splits = Splits(
        *(
            read_pairs(path, source_field=source_field, target_field=target_field)
            for path in (input_file, validation, test)
        )
    )
    loaded = load_task(task)
    result = compare_systems(
        server.connect,
        loaded,
        splits,
        folder / loaded.name,
        only=only or (),
        settings=TrainingSettings(minutes=minutes, decoded=decoded),
        reporter=RichReporter(),
    )
    title = f"{result.task}, {result.model}: {result.pairs['train']:,} pairs, {result.pairs['test']} test texts"
    table = report.markdown(title, result.rows, result.signatures)
    write_atomically(folder / f"{result.task}.md", table.encode())
    write_atomically(folder / f"{result.task}.json", f"{result.model_dump_json(indent=1)}\n".encode())
    report.draw(title, result.rows, folder / f"{result.task}.png")
    if as_json:
        print_record(result.model_dump(), as_json, title="")
    else:
        shown = Table("", "BLEU", "chrF", "perplexity", "p against published", "training s", title=title)
        for row in result.rows:
            ppl = "–" if row.ppl is None else f"{row.ppl:.2f}"
            p_value = "–" if row.p_value_chrf_vs_published is None else f"{row.p_value_chrf_vs_published:.3f}"
            shown.add_row(row.name, f"{row.bleu:.1f}", f"{row.chrf:.1f}", ppl, p_value, f"{row.train_seconds:.0f}")
        shown.caption = "p of the difference in chrF, by paired bootstrap"
        Console().print(shown)
        Console().print(*result.signatures, sep="\n", highlight=False)
