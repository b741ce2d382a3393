"""Settings chosen by trying: whole trainings, one change at a time, as many as a time allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from data_owner_client.adapter.types import AdapterForm
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.trainer import Trained

# What is tried, in this order.
_CHANGES: tuple[dict[str, Any], ...] = (
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
Fit = Callable[[TrainingSettings], Trained]


def search_settings(
    openings: Sequence[TrainingSettings],
    fit: Fit,
    *,
    forms: Sequence[AdapterForm],
    on_trial: Callable[[TrainingSettings, float], None],
) -> tuple[TrainingSettings, Trained]:
    """Train with the best of some settings, then with one change at a time; what is better on validation rows stays.

    What the user has set to something else than its default is not changed.

    Args:
        openings: to begin with, each trained in any case; `minutes` bounds the time of all. A further training is begun
            only if it should end in time.
        fit: trains.
        forms: of the adapter, that may be tried.
        on_trial: told of each training, and of its validation loss.
    """
    started, longest, tried = time.monotonic(), 0.0, set[TrainingSettings]()

    def attempt(candidate: TrainingSettings) -> Trained:
        nonlocal longest
        begun = time.monotonic()
        trained = fit(candidate)
        on_trial(candidate, trained.best_nll)
        tried.add(candidate)
        longest = max(longest, time.monotonic() - begun)
        return trained

    opened = [(opening, attempt(opening)) for opening in openings]
    best, trained = min(opened, key=lambda each: each[1].best_nll)
    for change in _changes(best, forms):
        if time.monotonic() - started + longest > 60 * best.minutes:
            break
        candidate = replace(best, **change)
        if candidate in tried or not candidate.makes_sense:
            continue
        other = attempt(candidate)
        if other.best_nll < trained.best_nll:
            best, trained = candidate, other
    return best, trained


def _changes(settings: TrainingSettings, forms: Sequence[AdapterForm]) -> Iterator[dict[str, Any]]:
    default = TrainingSettings()
    for change in _CHANGES:
        ((name, value),) = change.items()
        if value in forms if name == "form" else getattr(settings, name) == getattr(default, name):
            yield change
