"""The picture of the demo of intents: scores of all systems, and the training curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_owner_client.training.plots import draw_training
from data_owner_client.training.trainer import Epoch

_COLOURS = {"plm": "tab:gray", "plm_with_examples": "darkgray", "private": "tab:cyan", "shared": "tab:blue"}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a report, and write the picture to `path`."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    intents, frames, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    _bars(intents, report, "intent_accuracy", "Right intents, %")
    _bars(frames, report, "exact", "Exact frames, %")
    frames.set_yticklabels([])
    history = [Epoch(**epoch) for epoch in report["history"]["shared"]]
    draw_training(curves, history, report["validation_nll"]["shared"])
    figure.suptitle(f"{report['test_sentences']} test sentences, {report['train_sentences']} to learn from")
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, report: Mapping[str, Any], key: str, title: str) -> None:
    systems = report["systems"]
    titles, values = [row["title"] for row in systems.values()], [row[key] for row in systems.values()]
    container = axes.barh(titles, values, color=[_COLOURS[name] for name in systems])
    axes.bar_label(container, fmt="%.1f", padding=2)
    axes.set(title=title, xlim=(0, 110))
    axes.invert_yaxis()
