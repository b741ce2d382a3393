"""`pema-client build-memory`, `train`, `sweep`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from data_owner_client.adapter.types import ADAPTER_FORMS, SCHEDULES, AdapterForm
from data_owner_client.cli.app import command, set_threads
from data_owner_client.cli.inputs import pairs_of
from data_owner_client.cli.options import (
    AdapterFolder,
    AsJson,
    Decoded,
    Dtype,
    FileFormat,
    InputFile,
    MemoryFolder,
    Minutes,
    ServerOptions,
    ShareTargets,
    SourceField,
    Sources,
    TargetField,
    Targets,
    Threads,
)
from data_owner_client.cli.output import print_record
from data_owner_client.data.pairs import read_pairs
from data_owner_client.data.tasks import load_task
from data_owner_client.memory.build_splits import build_memories
from data_owner_client.memory.manifest import ContextMode
from data_owner_client.runtime.progress import RichReporter
from data_owner_client.training.settings import OLD_PAIRINGS, Pairing, TrainingSettings
from data_owner_client.training.sweep import Grid
from data_owner_client.training.sweep import sweep as run_sweep
from data_owner_client.training.sweep_results import SETTINGS, likeliest
from data_owner_client.training.train import train as train_adapter
from protocol.errors import InvalidData


@command("build-memory")
def build_memory(
    server: ServerOptions,
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
    pairs = pairs_of(input_file, sources, targets, file_format, source_field=source_field, target_field=target_field)
    held_out = read_pairs(validation, source_field=source_field, target_field=target_field) if validation else None
    with server.connect(dtype) as plm:
        report = build_memories(
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
    print_record(report.model_dump(), as_json, title="external memory")


def _pairing(word: str) -> str:
    """The pairing of this name; one of an earlier version is translated, with a warning."""
    if word in OLD_PAIRINGS:
        typer.echo(f"--pairing {word} is deprecated: use --pairing {OLD_PAIRINGS[word]}.", err=True)
        return OLD_PAIRINGS[word]
    if word not in get_args(Pairing):
        raise typer.BadParameter(f"{word!r} is not one of {', '.join(get_args(Pairing))}.")
    return word


@command()
def train(
    server: ServerOptions,
    memory: MemoryFolder = Path("memory"),
    adapter: AdapterFolder = Path("adapter"),
    form: Annotated[
        AdapterForm | None, typer.Option(help="Form of the adapter; default: what suits the memory and the pairing.")
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
        Pairing | None,
        typer.Option(
            help="Of targets with contexts in private memories; by_position: as in the paper; default: aligned or "
            "reliable, chosen on the validation memory.",
            parser=_pairing,
            metavar="[aligned|reliable|by_position]",
        ),
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
    minutes: Minutes = TrainingSettings.minutes,
    decoded: Decoded = TrainingSettings.decoded,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of joint training, at most.")] = TrainingSettings.epochs,
    distributions: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Where the owner gives no rows of the LM head (policy none): of how many contexts of the memory to "
            "ask for the full distribution, as rows are worked out from these. Default: a tenth more than the model "
            "is wide, which makes them exact; fewer make an estimate.",
        ),
    ] = TrainingSettings.distributions,
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
    - `pema-client train --minutes 30` (look longer for better settings; `--minutes 0` does not look)
    - `pema-client train --form paper --seed 1 --json`
    """
    set_threads(threads)
    settings = TrainingSettings(
        form=form,
        rank=rank,
        kappa=kappa,
        learning_rate=learning_rate,
        dropout=dropout,
        pairing=pairing,
        nearest=nearest,
        gate=gate,
        minutes=minutes,
        decoded=decoded,
        epochs=epochs,
        distributions=distributions,
        full_vocabulary=full_vocabulary,
        seed=seed,
        device=device,
    )
    with server.connect() as plm:
        _, report = train_adapter(plm, memory, adapter, settings=settings, reporter=RichReporter())
    card = report.card
    shown = {
        "folder": report.folder,
        "form": card.form,
        "pairing": card.settings["pairing"],
        "rank": card.rank,
        "candidates": card.candidates,
        **card.validation,
        "interpolation": card.interpolation_why,
        "seconds": report.seconds,
    }
    print_record(report.model_dump() if as_json else shown, as_json, title="adapter")


@command()
def sweep(
    server: ServerOptions,
    memory: MemoryFolder = Path("memory"),
    folder: Annotated[Path, typer.Option(help="For the results.")] = Path("runs/sweep"),
    form: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Forms: {', '.join(ADAPTER_FORMS)}; default: residual, or, on a private memory, of "
            "which all aligned rows are learned, recent."
        ),
    ] = None,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="Ranks.")] = None,
    kappa: Annotated[list[float] | None, typer.Option(min=0.0, max=1.0, help="Values of κ.")] = None,
    learning_rate: Annotated[list[float] | None, typer.Option(min=1e-9, help="Learning rates.")] = None,
    dropout: Annotated[list[float] | None, typer.Option(min=0.0, max=0.9, help="Dropout.")] = None,
    reconstruction_epochs: Annotated[
        list[int] | None, typer.Option(min=0, help="Epochs of the first phase; 0: joint training from the start.")
    ] = None,
    epochs: Annotated[list[int] | None, typer.Option(min=1, help="Epochs of the second phase, at most.")] = None,
    ema_decay: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=0.9999, help="Decay of the weights' moving average; 0: the last weights."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, max=2**31 - 1, help="Seeds.")] = None,
    examples: Annotated[
        list[int] | None, typer.Option(min=1, help="Sizes of the memory: its first so many examples; default: all.")
    ] = None,
    schedule: Annotated[
        list[str] | None, typer.Option(help=f"Schedules of λ: {', '.join(SCHEDULES)}; default: all but none.")
    ] = None,
    lambda_max: Annotated[
        list[float] | None, typer.Option(min=0.0, max=1.0, help="Values of λ_max; default: 0.1, 0.2, … 0.9.")
    ] = None,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Train on a grid of settings and measure every interpolation on the held-out pairs.

    Give an option several times for several values; what is left out stays at its default. Writes `sweep.csv`,
    `sweep.json` and `sweep.png`. Interrupted, the same command goes on where it stopped.

    Examples:

    - `pema-client sweep --rank 64 --rank 256 --rank 512`
    - `pema-client sweep --examples 500 --examples 1000 --examples 2000 --schedule constant --json`
    """
    set_threads(threads)
    _require_known("form", form, ADAPTER_FORMS)
    _require_known("schedule", schedule, SCHEDULES)
    given = {
        "form": form,
        "rank": rank,
        "kappa": kappa,
        "learning_rate": learning_rate,
        "dropout": dropout,
        "reconstruction_epochs": reconstruction_epochs,
        "epochs": epochs,
        "ema_decay": ema_decay,
        "seed": seed,
        "examples": examples,
        "schedule": schedule,
        "lambda_max": lambda_max,
    }
    grid = Grid(**{name: tuple(values) for name, values in given.items() if values})  # type: ignore[arg-type]
    with server.connect() as plm:
        rows = run_sweep(plm, memory, grid, folder, reporter=RichReporter())
    if as_json:
        sys.stdout.write(json.dumps([row.model_dump() for row in rows], indent=1) + "\n")
        return
    # Besides what was varied, what a reader expects.
    varied = [name for name in SETTINGS if name in ("form", "rank") or given[name]]
    columns = (*varied, "examples", "schedule", "lambda_max", "nll", "train_seconds")
    table = Table(*columns, title=f"likeliest interpolation of each training; the PLM alone: {rows[0].plm_nll:.3f}")
    for row in likeliest(rows):
        values = (getattr(row, name) for name in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


def _require_known(option: str, values: list[str] | None, known: Sequence[str]) -> None:
    for value in values or ():
        if value not in known:
            raise InvalidData(f"There is no {option} {value!r}.", hint=f"There are {', '.join(known)}.")
