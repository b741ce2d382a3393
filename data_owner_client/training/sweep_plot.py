"""Plot of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_owner_client.training.sweep_results import SweepRow


def plot_sweep(rows: Sequence[SweepRow], names: Sequence[str], path: Path) -> None:
    """Write a plot of the loss against λ_max, and against each of the named settings that was varied."""
    from matplotlib.figure import Figure  # slow to import

    varied = [name for name in names if len({row.value(name) for row in rows}) > 1]
    figure = Figure(figsize=(5 * (1 + len(varied)), 4), layout="constrained")
    parts = np.atleast_1d(figure.subplots(1, 1 + len(varied), sharey=True))
    for axes, name in zip(parts, ["lambda_max", *varied], strict=True):
        for schedule in dict.fromkeys(row.schedule for row in rows):
            best: dict[float, float] = {}
            for row in rows:
                if row.schedule == schedule:
                    value = row.value(name)
                    best[value] = min(row.nll, best.get(value, math.inf))
            axes.plot(sorted(best), [best[value] for value in sorted(best)], "o-", label=schedule)
        axes.axhline(rows[0].plm_nll, linestyle="--", color="gray", label="PLM alone")
        axes.set(xlabel=name, title=f"{name}, the best of all else")
    parts[0].set(ylabel="negative log-likelihood (nats per token)")
    parts[0].legend()
    figure.savefig(path, dpi=120)
