"""Search for training settings by whole trainings with one change at a time; all of them may become members."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from data_owner_client.adapter.types import AdapterForm
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.trainer import Trained

CHANGES: tuple[dict[str, Any], ...] = (
    {"dropout": 0.35},
    {"learning_rate": 1e-3},
    {"kappa": 0.05},
    {"form": "recent"},
    {"form": "residual"},
    {"rank": 256},
    {"dropout": 0.5},
    {"learning_rate": 4e-3},
    {"kappa": 0.5},
    {"rank": 1024},
    {"form": "paper"},
)
"""Changes in the order in which they are tried."""
Fit = Callable[[TrainingSettings], Trained]


def search_settings(
    candidates: Sequence[TrainingSettings],
    fit: Fit,
    *,
    forms: Sequence[AdapterForm],
    on_trial: Callable[[TrainingSettings, float], None],
    has_time_for: Callable[[float], bool],
) -> list[Trained]:
    """Train with every candidate, then change the best one step by step, and return all trainings, the best one first.

    A change is kept if it lowers the validation loss. Settings that the user changed from their defaults stay. Other
    seeds come last, one for each further member.

    Args:
        candidates: settings to begin with; each is trained, whatever the time.
        fit: trains an adapter with the settings.
        forms: forms of the adapter that may be tried.
        on_trial: called after each training with its settings and validation loss.
        has_time_for: tells whether another training may begin, given the seconds of the longest one so far.
    """
    trainings = list[Trained]()

    def attempt(candidate: TrainingSettings) -> None:
        trainings.append(fit(candidate))
        on_trial(candidate, trainings[-1].best_nll)

    def best() -> TrainingSettings:
        return min(trainings, key=_loss).settings

    for candidate in candidates:
        attempt(candidate)
    for change in _changes(best(), forms):
        if not has_time_for(max(each.seconds for each in trainings)):
            break
        candidate = replace(best(), **change)
        if candidate not in (each.settings for each in trainings) and candidate.makes_sense:
            attempt(candidate)
    return sorted(trainings, key=_loss)


def _loss(trained: Trained) -> float:
    return trained.best_nll


def _changes(settings: TrainingSettings, forms: Sequence[AdapterForm]) -> Iterator[dict[str, Any]]:
    default = TrainingSettings()
    for change in CHANGES:
        ((name, value),) = change.items()
        if value in forms if name == "form" else getattr(settings, name) == getattr(default, name):
            yield change
    # Other settings are as good members as other seeds, and may also be the best (docs/findings.md).
    for number in range(1, settings.members):
        yield {"seed": settings.seed + number}
