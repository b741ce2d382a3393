"""Points of the sensitivity study: trainings that differ from a default one in a single factor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, product
from typing import Any, Literal, get_args

from data_owner_client import TrainingSettings
from data_owner_client.adapter.types import AdapterForm, Schedule
from data_owner_client.decoding.settings import Effort
from data_owner_client.memory.types import ContextMode
from data_owner_client.training.settings import Pairing
from data_owner_client.training.settings_search import CHANGES
from harness.datasets.catalogue import DATA_SETS

Context = Literal["teacher-forced", "redacted", "redacted, reliable", "aligned", "reliable", "by position"]
"""Contexts of a memory's rows.

They are the true ones, those of redacted targets, or private ones by the way that targets are paired with them.
"""

# Between the seeds of members: more than points have seeds.
_SEED_STEP = 1000
_CONTEXTS: Mapping[Context, tuple[ContextMode, Pairing, AdapterForm]] = {
    "teacher-forced": ("teacher-forced", "aligned", "residual"),
    "redacted": ("redacted", "aligned", "residual"),
    "redacted, reliable": ("redacted", "reliable", "residual"),
    "aligned": ("private", "aligned", "recent"),
    "reliable": ("private", "reliable", "residual"),
    "by position": ("private", "by_position", "residual"),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One training.

    Attributes:
        task: name of the data set.
        model: name of an embedded model, with `/N` for one that has only N of its layers.
        context: contexts of the memory's rows.
        pairs: number of training pairs.
        rank: rank of the adapter.
        kappa: weight of the reconstruction loss.
        form: form of the adapter; None for the one that suits the contexts.
        seed: seed of the training.
        members: number of trainings with other seeds that the adapter averages.
        changes: number of trainings with other settings beside the first. The adapter averages the likeliest.
        neighbours: whether P_kNN of the same rows is averaged with the adapter's distribution.
        schedule: schedule with which the test set is answered, `none` for the PLM alone; None to measure likelihood
            alone.
        effort: search for the answers.
    """

    task: str
    model: str = "gemma-3-270m"
    context: Context = "teacher-forced"
    pairs: int = 1000
    rank: int = 512
    kappa: float = 0.2
    form: AdapterForm | None = None
    seed: int = 0
    members: int = 1
    changes: int = 0
    neighbours: bool = False
    schedule: Schedule | None = None
    effort: Effort = "low"

    @property
    def key(self) -> str:
        """The point in words."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None)

    @property
    def context_mode(self) -> ContextMode:
        """Contexts of the memory on disk."""
        return _CONTEXTS[self.context][0]

    @property
    def settings(self) -> list[TrainingSettings]:
        """Settings of each training."""
        _, pairing, form = _CONTEXTS[self.context]
        first = TrainingSettings(
            form=self.form or form, pairing=pairing, rank=self.rank, kappa=self.kappa, seed=self.seed
        )
        others: list[dict[str, Any]] = [{}] * (self.members - 1) + [*CHANGES[: self.changes]]
        seeds = (self.seed + _SEED_STEP * number for number in count(1))
        return [first, *(replace(first, seed=seed, **change) for seed, change in zip(seeds, others, strict=False))]

    @property
    def most_members(self) -> int:
        """Trainings that the adapter averages, at most."""
        return TrainingSettings().members if self.changes else self.members


FACTORS: Mapping[str, Sequence[Any]] = {
    "rank": (8, 64, 256, 512, 640),
    "kappa": (0.0, 0.2, 0.5, 0.8),
    "form": ("paper", "recent"),
    "pairs": (60, 125, 250, 500, 1000, 2000),
    "members": (1, 2, 4, 8),
    "changes": (3, 7),
    "neighbours": (False, True),
    "context": tuple(_CONTEXTS),
    "model": (
        "gemma-3-270m",
        "gemma-3-270m/15",
        "gemma-3-270m/12",
        "smollm2-135m",
        "smollm2-135m/25",
        "smollm2-135m/20",
    ),
}
"""Values of each factor; all other factors have their defaults."""
_ANSWERED_PAIRS = (125, 500, 2000)


def points(
    tasks: Sequence[str], factors: Sequence[str], seeds: int, values: Sequence[str] | None = None
) -> Iterator[Point]:
    """The points of a study, those with the first seed first, and the default one of each task before its others.

    Args:
        tasks: names of data sets.
        factors: names of `FACTORS`.
        seeds: number of trainings with each setting.
        values: values of the factors; None for all.
    """
    for seed, task in product(range(seeds), tasks):
        default = Point(task=task, seed=seed)
        changed = [
            replace(default, **{name: value})
            for name in factors
            for value in FACTORS[name]
            if values is None or str(value) in values
        ]
        yield from dict.fromkeys([default, *changed])


def answered_points(tasks: Sequence[str]) -> Iterator[Point]:
    """Points whose test sets are answered: each schedule of λ, and contexts and sizes of the memory with constant λ."""
    for task in tasks:
        default = Point(task=task, schedule="constant")
        changed = [replace(default, schedule=schedule) for schedule in get_args(Schedule)]
        changed += [replace(default, context=context) for context in FACTORS["context"]]
        changed += [replace(default, pairs=pairs) for pairs in _ANSWERED_PAIRS]
        yield from dict.fromkeys([default, *changed])


def effort_points(tasks: Sequence[str]) -> Iterator[Point]:
    """Points whose test sets are answered with each effort, at constant λ.

    Labels are scored and not searched, so tasks of the kind `classify` have none.
    """
    generated = [task for task in tasks if DATA_SETS[task].kind != "classify"]
    for task, effort in product(generated, get_args(Effort)):
        yield Point(task=task, schedule="constant", effort=effort)
