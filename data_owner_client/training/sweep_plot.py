"""Pictures of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data_owner_client.training.sweep_results import SweepRow


def plot_sweep(rows: Sequence[SweepRow], names: Sequence[str], path: Path) -> None:
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
