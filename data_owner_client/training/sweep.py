"""A grid of trainings on one memory, each with the held-out loss of every interpolation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.types import Schedule
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.arguments import AnyPath, to_path
from data_owner_client.runtime.atomic_files import require_writable, write_atomically
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import Memories, TrainingInput, resolve_settings
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.sweep_plot import plot_sweep
from data_owner_client.training.sweep_results import ROWS, SETTINGS, SweepRow, as_csv
from data_owner_client.training.validation import target_logprobs
from protocol.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values to combine: every value of one setting with every value of the others.

    Attributes:
        varied: values by name of a training setting, for example `{"rank": (64, 256)}`; one of `SETTINGS` each.
        base: settings of which no values are given.
        examples: sizes of the memory, its first pairs; None for all of them.
        schedule: schedules of λ.
        lambda_max: values of λ_max.
    """

    varied: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    base: TrainingSettings = field(default_factory=TrainingSettings)
    examples: Sequence[int | None] = (None,)
    schedule: Sequence[Schedule] = ("gradual", "linear", "constant")
    lambda_max: Sequence[float] = tuple(i / 10 for i in range(1, 10))

    def __post_init__(self) -> None:
        for name in self.varied:
            if name not in SETTINGS:
                raise InvalidRequest(f"A grid does not vary {name}.", hint=f"It varies {', '.join(SETTINGS)}.")

    def trainings(self) -> list[tuple[TrainingSettings, int | None]]:
        """Settings and number of examples of each training."""
        values = product(*(self.varied.get(name, (getattr(self.base, name),)) for name in SETTINGS), self.examples)
        return [(replace(self.base, **dict(zip(SETTINGS, each, strict=True))), examples) for *each, examples in values]


def sweep(
    plm: RemotePlm, memory: AnyPath, grid: Grid, folder: AnyPath, *, reporter: Reporter | None = None
) -> list[SweepRow]:
    """Train all adapters of the grid that were not trained yet; write `sweep.csv`, `sweep.json` and `sweep.png`.

    After an interruption, the same call goes on where it was. A call with another grid reuses the common trainings.

    Raises:
        InvalidData: a memory is missing, incomplete or damaged, or has too few examples. Or the folder is not writable.
        IdentityMismatch: the memory was built with another model.
    """
    reporter = reporter or Reporter()
    memory, folder = to_path(memory), to_path(folder)
    require_writable(folder)
    memories = Memories.open(memory, plm)
    rows: list[SweepRow] = []
    trainings = grid.trainings()
    for number, (unresolved, examples) in enumerate(trainings, 1):
        settings = resolve_settings(unresolved, memories.plan)[0]
        names = [name for name, values in grid.varied.items() if len(values) > 1]
        varied = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
        reporter.say(f"Training {number} of {len(trainings)}: {varied or 'as usual'}, {examples or 'all'} examples.")
        rows += _train_and_score(plm, memories, settings, examples, grid, folder, reporter)
    write_atomically(folder / "sweep.json", ROWS.dump_json(rows, indent=1))
    write_atomically(folder / "sweep.csv", as_csv(rows).encode())
    plot_sweep(rows, [*SETTINGS, "examples"], folder / "sweep.png")
    return rows


def _train_and_score(
    plm: RemotePlm,
    memories: Memories,
    settings: TrainingSettings,
    examples: int | None,
    grid: Grid,
    folder: Path,
    reporter: Reporter,
) -> list[SweepRow]:
    """Rows of one training, read from the file of an earlier run with the same inputs if there is one."""
    count = examples or memories.train.manifest.examples
    interpolations = [
        Interpolation(schedule=schedule, lambda_max=value)
        for schedule, value in product(grid.schedule, grid.lambda_max)
    ]
    record = json.dumps([memories.identity, count, asdict(settings), [each.model_dump() for each in interpolations]])
    path = folder / "trainings" / f"{hashlib.sha256(record.encode()).hexdigest()[:24]}.json"
    try:
        return ROWS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        pass  # not finished yet
    started = time.perf_counter()
    inputs = TrainingInput.from_memories(plm, memories, settings, reporter, examples=count)
    checkpoint = path.with_suffix(".safetensors")
    trained = inputs.fit(settings, checkpoint, reporter)
    seconds = time.perf_counter() - started
    pema_logprob_N = target_logprobs(trained.adapter, inputs.targets.candidates, inputs.validation.data)
    rows = [
        SweepRow(
            settings=replace(settings, rank=trained.adapter.rank),
            examples=count,
            schedule=each.schedule,
            lambda_max=each.lambda_max,
            nll=inputs.validation.mixture_nll(pema_logprob_N, each),
            plm_nll=inputs.plm_nll,
            train_seconds=seconds,
        )
        for each in interpolations
    ]
    write_atomically(path, ROWS.dump_json(rows))
    checkpoint.unlink(missing_ok=True)
    return rows
