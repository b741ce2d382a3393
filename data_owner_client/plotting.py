"""Pictures of trainings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_owner_client.training import Epoch

if TYPE_CHECKING:
    from data_owner_client.sweep import SweepRow


def draw_training(axes: Axes, history: list[Epoch], plm_nll: float) -> None:
    """Prediction loss and validation likelihood against epochs, with the PLM's own as a line."""
    joint = [epoch for epoch in history if epoch.phase == "joint"]
    epochs = [epoch.epoch for epoch in joint]
    axes.plot(epochs, [epoch.prediction_loss or 0.0 for epoch in joint], "o-", label="adapter, training rows")
    axes.plot(epochs, [epoch.validation_nll or 0.0 for epoch in joint], "o-", label="mixture, validation rows")
    axes.axhline(plm_nll, linestyle="--", color="gray", label="PLM alone, validation rows")
    axes.set(xlabel="epoch", ylabel="negative log-likelihood (nats per token)", title="Joint training")
    axes.legend()


def sweep(rows: Sequence[SweepRow], names: Sequence[str], path: Path) -> None:
    """Write `sweep.png`: likelihood against λ_max for every schedule, and against what was varied of these names."""
    varied = [name for name in names if len({getattr(row, name) for row in rows}) > 1]
    figure = Figure(figsize=(5 * (1 + len(varied)), 4), layout="constrained")
    parts = np.atleast_1d(figure.subplots(1, 1 + len(varied), sharey=True))
    for axes, name in zip(parts, ["lambda_max", *varied], strict=True):
        for schedule in dict.fromkeys(row.schedule for row in rows):
            best: dict[float, float] = {}
            for row in rows:
                if row.schedule == schedule:
                    value = getattr(row, name)
                    best[value] = min(row.nll, best.get(value, math.inf))
            axes.plot(sorted(best), [best[value] for value in sorted(best)], "o-", label=schedule)
        axes.axhline(rows[0].plm_nll, linestyle="--", color="gray", label="PLM alone")
        axes.set(xlabel=name, title=f"{name}, the best of all else")
    parts[0].set(ylabel="negative log-likelihood (nats per token)")
    parts[0].legend()
    figure.savefig(path, dpi=120)


def training(history: list[Epoch], plm_nll: float, path: Path) -> None:
    """Write `training.png`: both phases side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [epoch.reconstruction_loss for epoch in history]
    left.plot(range(1, len(history) + 1), losses, "o-", color="tab:green")
    left.axvline(sum(e.phase == "reconstruction" for e in history) + 0.5, linestyle=":", color="gray")
    left.set(xlabel="epoch (joint training begins at the dotted line)", ylabel="L_rct", title="Reconstruction")
    draw_training(right, history, plm_nll)
    figure.savefig(path, dpi=120)
