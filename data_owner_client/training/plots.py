"""Plots of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_owner_client.training.trainer import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_training(axes: Axes, history: list[Epoch], plm_nll: float) -> None:
    """Draw prediction loss and validation loss against epochs, with the PLM's validation loss as a line."""
    joint = [epoch for epoch in history if epoch.phase == "joint"]
    epochs = [epoch.epoch for epoch in joint]
    axes.plot(epochs, [epoch.prediction_loss or 0.0 for epoch in joint], "o-", label="adapter, training rows")
    axes.plot(epochs, [epoch.validation_nll or 0.0 for epoch in joint], "o-", label="mixture, validation rows")
    axes.axhline(plm_nll, linestyle="--", color="gray", label="PLM alone, validation rows")
    axes.set(xlabel="epoch", ylabel="negative log-likelihood (nats per token)", title="Joint training")
    axes.legend()


def plot_training(history: list[Epoch], plm_nll: float, path: Path) -> None:
    """Write a plot of both phases, side by side."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [epoch.reconstruction_loss for epoch in history]
    left.plot(range(1, len(history) + 1), losses, "o-", color="tab:green")
    left.axvline(sum(e.phase == "reconstruction" for e in history) + 0.5, linestyle=":", color="gray")
    left.set(xlabel="epoch (joint training begins at the dotted line)", ylabel="L_rct", title="Reconstruction")
    draw_training(right, history, plm_nll)
    figure.savefig(path, dpi=120)
