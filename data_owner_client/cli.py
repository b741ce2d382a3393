"""The command `pema-client`: arguments in, `verbs` called, results out."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_owner_client import comparison, generation, verbs
from data_owner_client.adapter import AdapterForm, TrainedAdapter
from data_owner_client.cli_options import (
    AdapterFolder,
    AsJson,
    Decoding,
    Draws,
    Dtype,
    Explain,
    FileFormat,
    InputFile,
    MemoryFolder,
    OptionalAdapter,
    Output,
    Server,
    ShareTargets,
    SourceField,
    Sources,
    Stream,
    TargetField,
    Targets,
    Threads,
    with_options,
)
from data_owner_client.cli_output import stream_text, write_texts
from data_owner_client.comparison import SYSTEMS, Splits, report
from data_owner_client.data import Format, Pair, read_lines, read_pairs, read_parallel
from data_owner_client.doctor import diagnose
from data_owner_client.evaluation import text_scores
from data_owner_client.memory.store import ContextMode
from data_owner_client.progress import RichReporter
from data_owner_client.tasks import Task, load_task
from data_owner_client.training import Pairing, TrainingSettings
from protocol.errors import InvalidData, PemaError

_P = ParamSpec("_P")
_DOCTOR_WAITS_S = 10.0
_INTERRUPTED = 130  # what shells make of SIGINT

app = typer.Typer(
    help="PEMA, the data owner's side: adapt somebody else's language model to your private task.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


def _leave(message: str, *, status: int) -> NoReturn:
    """End at once. sys.exit would wait for threads that wait for the server; every file is written whole or not."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


def _clear_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """Errors as one line that says what to do, and exit status 1; never a traceback for a user's mistake."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PemaError as error:
            _leave(f"pema-client: {error}", status=1)
        except KeyboardInterrupt:
            again = "run the same command again (build-memory and train go on where they were, as do files of texts)"
            _leave(f"pema-client: interrupted; {again}.", status=_INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output, such as head, has gone.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run


@app.callback()
def options(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log every request with its id, which the server logs, too.")
    ] = False,
) -> None:
    """PEMA, the data owner's side: adapt somebody else's language model to your private task."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("data_owner_client").setLevel(logging.DEBUG if verbose else logging.WARNING)
    # It logs tracebacks of garbled answers, which we are told of, too, and ask for again.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)


@app.command()
@with_options
@_clear_errors
def info(server: Server, as_json: AsJson = False) -> None:
    """Show which model a server has and what it allows.

    Example: `pema-client info --server http://127.0.0.1:8000`
    """
    with server.connect() as plm:
        _print(plm.card.model_dump(), as_json, title=plm.card.name)


@app.command()
@with_options
@_clear_errors
def doctor(
    server: Server,
    memory: Annotated[list[Path] | None, typer.Option(help="Memories to check; default: ./memory.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapters to check; default: ./adapter.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the way to a server, and that memories, adapters and the cached LM head belong to its model.

    Tells how a round trip's time splits into network, queue, compute and serialisation. Exit status 1 if a check fails.

    Examples:

    - `pema-client doctor --server https://plm.example.com`
    - `pema-client doctor --memory memory --adapter adapter --json`
    """
    impatient = replace(
        server,
        give_up_after=min(server.give_up_after, _DOCTOR_WAITS_S),
        timeout=min(server.timeout, 3 * _DOCTOR_WAITS_S),
    )
    diagnosis = diagnose(
        impatient.connect,
        memory if memory is not None else [path for path in [Path("memory")] if path.is_dir()],
        adapter if adapter is not None else [path for path in [Path("adapter")] if path.is_dir()],
    )
    if as_json:
        _print(diagnosis.model_dump(), as_json, title="")
    else:
        table = Table("", "check", "found", "advice", title=server.server)
        for finding in diagnosis.findings:
            mark = "[green]✓[/]" if finding.ok else "[red]✗[/]"
            table.add_row(mark, *map(escape, (finding.check, finding.detail, finding.advice)))
        Console().print(table)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command("fetch-head")
@with_options
@_clear_errors
def fetch_head(server: Server, as_json: AsJson = False) -> None:
    """Download the whole LM head into the cache, for work that needs more than the candidates' rows.

    Interrupted, the same command goes on where it stopped. What is there is checked against the server's digest.

    Example: `pema-client fetch-head --server grpc://127.0.0.1:8001`
    """
    with server.connect() as plm:
        head = plm.fetch_head(RichReporter())
        record = {"folder": str(head.folder), "rows": head.rows, "sha256": plm.card.head_digest}
    _print(record, as_json, title="LM head")


@app.command("build-memory")
@with_options
@_clear_errors
def build_memory(
    server: Server,
    memory: MemoryFolder = Path("memory"),
    task: Annotated[str, typer.Option(help="Name of a built-in task, or a TOML file.")] = "translate-en-de",
    input_file: InputFile = None,
    sources: Sources = None,
    targets: Targets = None,
    validation: Annotated[
        Path | None, typer.Option(help="Pairs held out for validation; default: a share of the input.")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of the input to hold out (at most 300 pairs).")
    ] = 0.05,
    context: Annotated[
        ContextMode | None,
        typer.Option(help="Contexts of the memory; default: private, or teacher-forced with --share-targets."),
    ] = None,
    share_targets: ShareTargets = False,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    target_field: TargetField = "target",
    dtype: Dtype = "float16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what the folder holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build an external memory from pairs of texts. Interrupted, the same command goes on where it stopped.

    Private contexts send your source texts to the owner of the PLM, but no target. Teacher-forced ones are better
    aligned and send the targets, too.

    Examples:

    - `pema-client build-memory --input pairs.jsonl --memory memory`
    - `pema-client build-memory --input pairs.tsv --share-targets`
    - `pema-client build-memory --sources train.en --targets train.de --task my-task.toml`

    A task is a TOML file such as:

        name = "my-task"
        instruction = "Rewrite the sentence in plain language."
        source_label = "Original"
        target_label = "Plain"
        format = "plain"          # or "chat": the model's own chat template
        [[examples]]
        source = "Terminate the operation."
        target = "Stop."
    """
    mode: ContextMode = context or ("teacher-forced" if share_targets else "private")
    pairs = _pairs(input_file, sources, targets, file_format, source_field=source_field, target_field=target_field)
    held_out = read_pairs(validation, source_field=source_field, target_field=target_field) if validation else None
    with server.connect(dtype) as plm:
        report = verbs.build_memories(
            plm,
            load_task(task),
            pairs,
            memory,
            validation=held_out,
            validation_fraction=validation_fraction,
            context_mode=mode,
            share_targets=share_targets,
            overwrite=overwrite,
            reporter=RichReporter(),
        )
    _print(report.model_dump(), as_json, title="external memory")


@app.command()
@with_options
@_clear_errors
def train(
    server: Server,
    memory: MemoryFolder = Path("memory"),
    adapter: AdapterFolder = Path("adapter"),
    form: Annotated[
        AdapterForm | None, typer.Option(help="Form of the adapter; default: residual where the memory allows it.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="R, at most the model's hidden size.")] = TrainingSettings.rank,
    kappa: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="κ, weight of the reconstruction loss.")
    ] = TrainingSettings.kappa,
    learning_rate: Annotated[
        float, typer.Option(min=1e-9, help="Adam's learning rate.")
    ] = TrainingSettings.learning_rate,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Dropout.")] = TrainingSettings.dropout,
    pairing: Annotated[
        Pairing, typer.Option(help="Of targets with contexts in private memories; position: as the paper draws it.")
    ] = TrainingSettings.pairing,
    nearest: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Pairs of the memory that the PLM sees as examples, those most like the text at hand; default: chosen "
            "on the validation memory; none if its targets are private.",
        ),
    ] = TrainingSettings.nearest,
    gate: Annotated[
        bool, typer.Option("--gate/--no-gate", help="Whether a learned gate may take the place of a schedule of λ.")
    ] = TrainingSettings.gate,
    decoded: Annotated[
        int,
        typer.Option(min=0, help="Held-out texts that are decoded to choose λ by chrF; 0: by likelihood alone."),
    ] = TrainingSettings.decoded,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of joint training, at most.")] = TrainingSettings.epochs,
    full_vocabulary: Annotated[
        bool,
        typer.Option(
            "--full-vocabulary",
            help="Softmax over all tokens, not only those of the targets; the adapter then holds the whole LM head.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything random.")] = TrainingSettings.seed,
    device: Annotated[
        str | None, typer.Option(help="Where to train, such as cpu or cuda:1; default: CUDA where there is CUDA.")
    ] = None,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Train the adapter on this machine. The defaults need no tuning; the best validation epoch is kept.

    How the adapter is then used is chosen on the validation memory: schedule and λ_max or a learned gate and, where the
    targets were shared, whether the PLM sees the most similar pairs of the memory as examples.

    Writes `adapter.json`, `adapter.safetensors`, `training.json` and `training.png`. The memory may be larger than RAM.
    Stopped, the same command goes on where it was, to the same adapter.

    Examples:

    - `pema-client train --memory memory --adapter adapter`
    - `pema-client train --form paper --seed 1 --json`
    """
    _set_threads(threads)
    settings = TrainingSettings(
        form=form,
        rank=rank,
        kappa=kappa,
        learning_rate=learning_rate,
        dropout=dropout,
        pairing=pairing,
        nearest=nearest,
        gate=gate,
        decoded=decoded,
        epochs=epochs,
        full_vocabulary=full_vocabulary,
        seed=seed,
        device=device,
    )
    with server.connect() as plm:
        _, report = verbs.train(plm, memory, adapter, settings=settings, reporter=RichReporter())
    card = report.card
    shown = {
        "folder": report.folder,
        "form": card.form,
        "rank": card.rank,
        "candidates": card.candidates,
        **card.validation,
        "interpolation": card.interpolation_why,
        "seconds": report.seconds,
    }
    _print(report.model_dump() if as_json else shown, as_json, title="adapter")


@app.command()
@with_options
@_clear_errors
def translate(
    server: Server,
    decoding: Decoding,
    draws: Draws,
    texts: Annotated[list[str] | None, typer.Argument(help="Source texts; or give --input.")] = None,
    adapter: OptionalAdapter = None,
    task: Annotated[str | None, typer.Option(help="Built-in task or TOML file; default: the adapter's.")] = None,
    input_file: InputFile = None,
    output: Output = None,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    stream: Stream = False,
    explain: Explain = None,
    as_json: AsJson = False,
) -> None:
    """Translate source texts with a task's prompt, one output line each.

    Examples:

    - `pema-client translate --adapter adapter "The device is offline."`
    - `pema-client translate --adapter adapter --input test.jsonl --output test.de`
    - `pema-client translate --task translate-en-de < texts.txt`
    - `pema-client translate --adapter adapter --schedule gradual --lambda-max 0.9 --input test.txt`
    - `pema-client translate --adapter adapter --explain why.jsonl "The device is offline."`
    """
    _set_threads(decoding.threads)
    inputs = _sources(texts, input_file, file_format, source_field)
    trained = TrainedAdapter.load(adapter) if adapter else None
    with server.connect(decoding.dtype) as plm:
        chosen = load_task(task) if task else None
        run = partial(generation.translate, plm, adapter=trained, task=chosen, **_how(decoding, draws, trained))
        identity = ["translate", plm.card.digest, trained and trained.card, chosen, *decoding.identity(trained), draws]
        if stream:
            stream_text(inputs, run, chosen or (trained.card.task if trained else Task(name="bare")), plm.tokenizer)
        else:
            write_texts(inputs, run, identity, output, as_json, explain, plm.tokenizer)


@app.command()
@with_options
@_clear_errors
def generate(
    server: Server,
    decoding: Decoding,
    draws: Draws,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, used as they are; or give --input.")] = None,
    adapter: OptionalAdapter = None,
    input_file: InputFile = None,
    output: Output = None,
    file_format: FileFormat = None,
    source_field: SourceField = "source",
    stream: Stream = False,
    explain: Explain = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts as they are, without a template, up to the stop of the adapter's task (else a newline).

    Examples:

    - `pema-client generate "The capital of France is"`
    - `pema-client generate --adapter adapter --input prompts.txt --json`
    """
    _set_threads(decoding.threads)
    inputs = _sources(prompts, input_file, file_format, source_field)
    trained = TrainedAdapter.load(adapter) if adapter else None
    with server.connect(decoding.dtype) as plm:
        run = partial(generation.generate, plm, adapter=trained, **_how(decoding, draws, trained))
        identity = ["generate", plm.card.digest, trained and trained.card, *decoding.identity(trained), draws]
        if stream:
            stream_text(inputs, run, trained.card.task if trained else Task(name="bare"), plm.tokenizer)
        else:
            write_texts(inputs, run, identity, output, as_json, explain, plm.tokenizer)


@app.command()
@with_options
@_clear_errors
def evaluate(
    server: Server,
    decoding: Decoding,
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
    _set_threads(decoding.threads)
    pairs = _pairs(input_file, sources, targets, file_format, source_field=source_field, target_field=target_field)
    if hypotheses is not None:
        lines = read_lines(hypotheses)
        if len(lines) != len(pairs):
            raise InvalidData(f"{hypotheses} has {len(lines)} lines for {len(pairs)} references.", hint="One each.")
        scores = text_scores(lines, [pair.target or "" for pair in pairs])
        _print(scores.model_dump(), as_json, title=str(hypotheses))
        return
    if adapter is None:
        raise InvalidData("There is nothing to evaluate.", hint="Give --adapter, or --hypotheses to score a file.")
    trained = TrainedAdapter.load(adapter)
    with server.connect(decoding.dtype) as plm:
        report = verbs.evaluate(
            plm,
            pairs,
            trained,
            interpolation=decoding.interpolation(trained),
            share_targets=share_targets,
            decoding=decoding.settings,
            lookup=decoding.drafts(),
            reporter=RichReporter(),
        )
    if as_json:
        _print(report.model_dump(), as_json, title="")
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


@app.command()
@with_options
@_clear_errors
def compare(
    server: Server,
    input_file: Annotated[Path, typer.Option("--input", help="Pairs to train on.")],
    validation: Annotated[Path, typer.Option(help="Pairs held out for validation.")],
    test: Annotated[Path, typer.Option(help="Pairs to evaluate on.")],
    task: Annotated[str, typer.Option(help="Name of a built-in task, or a TOML file.")] = "translate-en-de",
    folder: Annotated[Path, typer.Option(help="For the results, and below it memories and adapters.")] = Path(
        "runs/compare"
    ),
    only: Annotated[list[str] | None, typer.Option(help=f"Measure only this system: {', '.join(SYSTEMS)}.")] = None,
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
    _set_threads(threads)
    splits = Splits(
        *(
            read_pairs(path, source_field=source_field, target_field=target_field)
            for path in (input_file, validation, test)
        )
    )
    loaded = load_task(task)
    result = comparison.compare(
        server.connect, loaded, splits, folder / loaded.name, only=only or (), reporter=RichReporter()
    )
    title = f"{result.task}, {result.model}: {result.pairs['train']:,} pairs, {result.pairs['test']} test texts"
    table = report.markdown(title, result.rows, result.signatures)
    report.write(table, folder / f"{result.task}.md")
    report.write(result.model_dump_json(indent=1) + "\n", folder / f"{result.task}.json")
    report.draw(title, result.rows, folder / f"{result.task}.png")
    if as_json:
        _print(result.model_dump(), as_json, title="")
    else:
        shown = Table("", "BLEU", "chrF", "perplexity", "p against published", "training s", title=title)
        for row in result.rows:
            ppl = "–" if row.ppl is None else f"{row.ppl:.2f}"
            p_value = "–" if row.p_value_chrf_vs_published is None else f"{row.p_value_chrf_vs_published:.3f}"
            shown.add_row(row.name, f"{row.bleu:.1f}", f"{row.chrf:.1f}", ppl, p_value, f"{row.train_seconds:.0f}")
        shown.caption = "p of the difference in chrF, by paired bootstrap"
        Console().print(shown)
        Console().print(*result.signatures, sep="\n", highlight=False)


def main() -> None:
    """Entry point of `pema-client`."""
    app()


def _set_threads(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def _pairs(
    input_file: Path | None,
    sources: Path | None,
    targets: Path | None,
    file_format: Format | None,
    *,
    source_field: str,
    target_field: str,
) -> list[Pair]:
    if sources is not None and targets is not None and input_file is None:
        return read_parallel(sources, targets)
    if sources is not None or targets is not None:
        raise InvalidData("Texts were given in two ways, or only half.", hint="--input, or --sources with --targets.")
    return read_pairs(input_file or Path("-"), format=file_format, source_field=source_field, target_field=target_field)


def _sources(
    texts: list[str] | None, input_file: Path | None, file_format: Format | None, source_field: str
) -> list[str]:
    if texts and input_file is not None:
        raise InvalidData("Texts were given in two ways.", hint="Give them as arguments or with --input.")
    if texts:
        return texts
    path = input_file or Path("-")
    kind = file_format or ("text" if str(path) == "-" else None)
    return [pair.source for pair in read_pairs(path, format=kind, source_field=source_field, need_targets=False)]


def _how(decoding: Decoding, draws: Draws, adapter: TrainedAdapter | None) -> dict[str, Any]:
    """What `translate` and `generate` have in common."""
    return {
        "interpolation": decoding.interpolation(adapter),
        "decoding": decoding.settings,
        "lookup": decoding.drafts(),
        "sampling": draws.sampling,
        "samples": draws.samples,
        "best": draws.best,
        "reporter": RichReporter(),
    }


def _print(record: dict[str, Any], as_json: bool, *, title: str) -> None:
    if as_json:
        sys.stdout.write(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        return
    table = Table("", "", title=title, show_header=False)
    for key, value in record.items():
        text = "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, f"{value:,.3f}" if isinstance(value, float) else text)
    Console().print(table)


if __name__ == "__main__":
    main()
