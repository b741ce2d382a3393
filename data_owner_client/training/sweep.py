"""A grid of trainings on one memory, and how every interpolation does on the held-out pairs with each of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from pydantic import ValidationError

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.types import AdapterForm, Schedule
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.atomic_files import write_atomically
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import Memories, TrainingInput, resolve_settings
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.sweep_plot import plot_sweep
from data_owner_client.training.sweep_results import ROWS, SETTINGS, SweepRow, as_csv
from data_owner_client.training.validation import target_logprobs


@dataclass(frozen=True)
class Grid:
    """What to combine with what.

    Attributes:
        form: and what follows, up to the examples: see `TrainingSettings`.
        examples: pairs of the memory, its first so many; None for all.
    """

    form: Sequence[AdapterForm | None] = (TrainingSettings.form,)
    rank: Sequence[int] = (TrainingSettings.rank,)
    kappa: Sequence[float] = (TrainingSettings.kappa,)
    learning_rate: Sequence[float] = (TrainingSettings.learning_rate,)
    dropout: Sequence[float] = (TrainingSettings.dropout,)
    reconstruction_epochs: Sequence[int] = (TrainingSettings.reconstruction_epochs,)
    epochs: Sequence[int] = (TrainingSettings.epochs,)
    ema_decay: Sequence[float] = (TrainingSettings.ema_decay,)
    seed: Sequence[int] = (TrainingSettings.seed,)
    examples: Sequence[int | None] = (None,)
    schedule: Sequence[Schedule] = ("gradual", "linear", "constant")
    lambda_max: Sequence[float] = tuple(i / 10 for i in range(1, 10))

    def trainings(self) -> list[tuple[TrainingSettings, int | None]]:
        """Settings and number of examples of each training."""
        values = product(*(getattr(self, name) for name in SETTINGS), self.examples)
        return [(TrainingSettings(**dict(zip(SETTINGS, each, strict=True))), examples) for *each, examples in values]


def sweep(
    plm: RemotePlm, memory: Path, grid: Grid, folder: Path, *, reporter: Reporter | None = None
) -> list[SweepRow]:
    """Train all adapters of the grid that were not trained yet; write `sweep.csv`, `sweep.json` and `sweep.png`.

    Interrupted, the same call goes on where it was; with another grid, it reuses the trainings that both have.

    Raises:
        InvalidData: a memory is missing, incomplete or damaged, or has fewer examples than asked for.
        IdentityMismatch: the memory was built with another model.
    """
    reporter = reporter or Reporter()
    memories = Memories.open(memory, plm)
    rows: list[SweepRow] = []
    trainings = grid.trainings()
    for number, (given, examples) in enumerate(trainings, 1):
        settings = resolve_settings(given, memories.plan)[0]
        told = ", ".join(f"{name} {getattr(settings, name)}" for name in SETTINGS if len(getattr(grid, name)) > 1)
        reporter.say(f"Training {number} of {len(trainings)}: {told or 'as usual'}, {examples or 'all'} examples.")
        rows += _training(plm, memories, settings, examples, grid, folder, reporter)
    write_atomically(folder / "sweep.json", ROWS.dump_json(rows, indent=1))
    write_atomically(folder / "sweep.csv", as_csv(rows).encode())
    plot_sweep(rows, [*SETTINGS, "examples"], folder / "sweep.png")
    return rows


def _training(
    plm: RemotePlm,
    memories: Memories,
    settings: TrainingSettings,
    examples: int | None,
    grid: Grid,
    folder: Path,
    reporter: Reporter,
) -> list[SweepRow]:
    """The rows of one training, kept under all that decides them."""
    count = examples or memories.train.manifest.examples
    interpolations = [
        Interpolation(schedule=schedule, lambda_max=value)
        for schedule, value in product(grid.schedule, grid.lambda_max)
    ]
    record = json.dumps([memories.identity, count, asdict(settings), [each.model_dump() for each in interpolations]])
    kept = folder / "trainings" / f"{hashlib.sha256(record.encode()).hexdigest()[:24]}.json"
    try:
        return ROWS.validate_json(kept.read_bytes())
    except (OSError, ValidationError):
        pass  # not done yet, or only half
    started = time.perf_counter()
    given = TrainingInput.of(plm, memories, settings, reporter, examples=count)
    checkpoint = kept.with_suffix(".safetensors")
    trained = given.fit(settings, checkpoint, reporter)
    seconds = time.perf_counter() - started
    pema_logprob_N = target_logprobs(trained.adapter, given.targets.candidates, given.validation.data)
    found = [
        SweepRow(
            **{name: getattr(settings, name) for name in SETTINGS} | {"rank": trained.adapter.A.out_features},
            examples=count,
            schedule=each.schedule,
            lambda_max=each.lambda_max,
            nll=given.validation.mixture_nll(pema_logprob_N, each),
            plm_nll=given.plm_nll,
            train_seconds=seconds,
        )
        for each in interpolations
    ]
    write_atomically(kept, ROWS.dump_json(found))
    checkpoint.unlink(missing_ok=True)
    return found
