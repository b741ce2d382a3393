"""`pema-client build-memory`, `train`, `sweep`."""

from __future__ import annotations

import json
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args

from annotated_types import Ge, Le
from cyclopts import Parameter

from data_owner_client.adapter.types import Schedule
from data_owner_client.cli.app import command, set_threads
from data_owner_client.cli.inputs import pairs_of
from data_owner_client.cli.options import (
    DATA,
    DEFAULT_SERVER,
    GRID,
    OUTPUT,
    AdapterFolder,
    AsJson,
    Connection,
    Dtype,
    InputFile,
    MemoryFolder,
    PathOption,
    Reading,
    Server,
    ShareEarlierAnswers,
    ShareRedacted,
    ShareTargets,
    Sources,
    Targets,
    TaskName,
    Threads,
    Training,
    chosen_context,
    connected,
)
from data_owner_client.data.reading.settings import DEFAULT_READING
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.connection.settings import DEFAULT_CONNECTION
from data_owner_client.runtime.declared_settings import declared_setting, varied_names
from data_owner_client.training.settings import DEFAULT_TRAINING, TrainingSettings


@command("build-memory")
def build_memory(
    *,
    memory: MemoryFolder = Path("memory"),
    task: TaskName = "translate-en-de",
    input_file: InputFile = None,
    sources: Sources = None,
    targets: Targets = None,
    validation: Annotated[
        PathOption | None, Parameter(help="Pairs held out for validation. Default: a share of the input.", group=DATA)
    ] = None,
    validation_fraction: Annotated[
        float, Ge(0), Le(0.5), Parameter(help="Share of the input to hold out (at most 300 pairs).", group=DATA)
    ] = 0.05,
    context: Annotated[
        ContextMode | None,
        Parameter(
            help="Contexts of the memory. Default: private, teacher-forced with --share-targets, or redacted with "
            "--share-redacted.",
            group=DATA,
        ),
    ] = None,
    reading: Reading = DEFAULT_READING,
    overwrite: Annotated[bool, Parameter(help="Delete the contents of the folder first.", group=DATA)] = False,
    as_json: AsJson = False,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
    dtype: Dtype = "float16",
    share_targets: ShareTargets = False,
    share_redacted: ShareRedacted = None,
    share_earlier_answers: ShareEarlierAnswers = False,
) -> None:
    r"""Build an external memory from pairs of texts. Interrupted, the same command goes on where it stopped.

    Private contexts send your source texts to the owner of the PLM, but no target. Teacher-forced ones are better
    aligned and send the targets, too. Redacted ones send the targets with surrogates in place of what you may not show,
    such as names and numbers; the adapter still learns the true texts. Of a conversation, private contexts learn the
    first answer alone, because the prompts for later ones show it; see --share-earlier-answers.

    Examples:

    - `pema-client build-memory --input pairs.jsonl --memory memory`
    - `pema-client build-memory --input pairs.tsv --share-targets`
    - `pema-client build-memory --input pairs.jsonl --share-redacted rules.toml`
    - `pema-client build-memory --sources train.en --targets train.de --task my-task.toml`

    A task is a TOML file such as:

        name = "my-task"
        kind = "rewrite"          # or classify, extract, answer, summarise, chat
        instruction = "Rewrite the sentence in plain language."
        source_label = "Original"
        target_label = "Plain"
        format = "plain"          # or "chat": the model's own chat template
        [[examples]]
        source = "Terminate the operation."
        target = "Stop."

    Rules of `--share-redacted` are a TOML file such as:

        builtin = ["numbers", "emails"]   # also "dates", "urls"
        words = ["Acme", "Jane Doe"]      # whole words, in upper or lower case
        word_files = ["names.txt"]        # one a line, relative to this file
        sources = true                    # replace them in the source texts, too
        [[patterns]]
        kind = "customer"
        regex = 'C-\d+'
        [presidio]                        # needs pip install 'pema[client,redaction]'
        model = "en_core_web_lg"          # of spaCy; without one, only patterns such as PHONE_NUMBER
        entities = ["PERSON", "LOCATION"]

    The kind of a task decides the metrics, and fills in what the task leaves open. `classify` may list its `labels`,
    and `extract` may have an `answer_schema`: a JSON schema, or the name of its file.
    """
    from data_owner_client.cli.output import print_record
    from data_owner_client.data.reading.reader import spool_pairs
    from data_owner_client.data.redaction.rules import load_redaction
    from data_owner_client.data.tasks import load_task
    from data_owner_client.memory.build_splits import build_memories
    from data_owner_client.runtime.progress_display import stderr_reporter

    mode = chosen_context(context, share_targets=share_targets, share_redacted=share_redacted)
    redaction = load_redaction(share_redacted) if share_redacted else None
    pairs = pairs_of(input_file, sources, targets, reading)
    held_out = spool_pairs(validation, reading) if validation else None
    with connected(server, connection, dtype) as plm:
        report = build_memories(
            plm,
            load_task(task),
            pairs,
            memory,
            validation=held_out,
            validation_fraction=validation_fraction,
            context_mode=mode,
            share_targets=share_targets,
            redaction=redaction,
            share_earlier_answers=share_earlier_answers,
            overwrite=overwrite,
            skip_invalid=reading.skip_invalid,
            reporter=stderr_reporter(),
        )
    print_record(report.model_dump(), as_json, title="external memory")


@command()
def train(
    *,
    memory: MemoryFolder = Path("memory"),
    adapter: AdapterFolder = Path("adapter"),
    settings: Training = DEFAULT_TRAINING,
    as_json: AsJson = False,
    threads: Threads = 0,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
) -> None:
    """Train the adapter on this machine. The defaults need no tuning; the best validation epoch is kept.

    All of it takes at most `--minutes`. What is done, what is left out, and how long it takes is said before the start.

    How the adapter is then used is chosen on the validation memory: schedule and λ_max or a learned gate and, where the
    targets were shared, whether the PLM sees the most similar pairs of the memory as examples.

    Writes `adapter.json`, `adapter.safetensors`, `training.json` and `training.png`. The memory may be larger than RAM.
    Stopped, the same command goes on where it was, to the same adapter.

    Examples:

    - `pema-client train --memory memory --adapter adapter`
    - `pema-client train --minutes 60` (time for all that helps; `--minutes 0` trains once and does nothing else)
    - `pema-client train --form paper --seed 1 --json`
    """
    from data_owner_client.cli.output import print_record
    from data_owner_client.runtime.progress_display import stderr_reporter
    from data_owner_client.training.train import train as train_adapter

    set_threads(threads)
    with connected(server, connection) as plm:
        _, report = train_adapter(plm, memory, adapter, settings=settings, reporter=stderr_reporter())
    card = report.card
    shown = {
        "folder": report.folder,
        "form": card.form,
        "pairing": card.settings["pairing"],
        "rank": card.rank,
        "networks": max(1, len(card.members)),
        "candidates": card.candidates,
        **card.validation,
        "interpolation": card.interpolation_why,
        "seconds": report.seconds,
    }
    print_record(report.model_dump() if as_json else shown, as_json, title="adapter")


def _several(name: str) -> tuple[str, Any, Any]:
    """A field of `_Varied`: any number of values of a training setting."""
    setting = declared_setting(TrainingSettings, name)
    value, *metadata = get_args(setting.annotation)
    if NoneType in get_args(value):  # the default alone
        (value,) = (part for part in get_args(value) if part is not NoneType)
    several = list[Annotated[value, *metadata]] | None  # type: ignore[valid-type]
    return name, Annotated[several, Parameter(help=setting.sentence)], None


if TYPE_CHECKING:
    _Varied = Any
else:
    _Varied = make_dataclass(
        "_Varied",
        map(_several, varied_names(TrainingSettings)),
        namespace={"__module__": __name__},
        frozen=True,
        kw_only=True,
    )
_NOT_VARIED = _Varied()


@command()
def sweep(
    *,
    memory: MemoryFolder = Path("memory"),
    examples: Annotated[
        list[Annotated[int, Ge(1)]] | None,
        Parameter(help="Size of the memory: its first N pairs. Default: all.", group=GRID),
    ] = None,
    varied: Annotated[_Varied, Parameter(name="*", group=GRID)] = _NOT_VARIED,
    schedule: Annotated[
        list[Schedule] | None, Parameter(help="Schedule of λ. Default: all but none.", group=GRID)
    ] = None,
    lambda_max: Annotated[
        list[Annotated[float, Ge(0), Le(1)]] | None,
        Parameter(help="λ_max of the schedules. Default: 0.1, 0.2, … 0.9.", group=GRID),
    ] = None,
    folder: Annotated[PathOption, Parameter(help="Folder for the results.", group=OUTPUT)] = Path("runs/sweep"),
    as_json: AsJson = False,
    threads: Threads = 0,
    server: Server = DEFAULT_SERVER,
    connection: Connection = DEFAULT_CONNECTION,
) -> None:
    """Train on a grid of settings and measure every interpolation on the held-out pairs.

    Give an option of the grid several times for several values; the others stay at their defaults. Writes `sweep.csv`,
    `sweep.json` and `sweep.png`. Interrupted, the same command goes on where it stopped.

    Examples:

    - `pema-client sweep --rank 64 --rank 256 --rank 512`
    - `pema-client sweep --examples 500 --examples 1000 --examples 2000 --schedule constant --json`
    """
    from data_owner_client.cli.output import print_sweep
    from data_owner_client.runtime.progress_display import stderr_reporter
    from data_owner_client.training.sweep import Grid
    from data_owner_client.training.sweep import sweep as run_sweep

    set_threads(threads)
    points = {"examples": examples, "schedule": schedule, "lambda_max": lambda_max}
    settings = {name: tuple(values) for name, values in vars(varied).items() if values}
    grid = Grid(varied=settings, **{name: tuple(values) for name, values in points.items() if values})  # type: ignore[arg-type]
    with connected(server, connection) as plm:
        rows = run_sweep(plm, memory, grid, folder, reporter=stderr_reporter())
    if as_json:
        sys.stdout.write(json.dumps([row.model_dump() for row in rows], indent=1) + "\n")
    else:
        print_sweep(rows, varied=list(settings))
