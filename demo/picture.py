"""The picture of a demo run: scores of the PLM and of PEMA, and the training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_owner_client.training.plots import draw_training
from data_owner_client.training.trainer import Epoch

_BARS = (
    ("PLM", "plm", "tab:gray"),
    ("PEMA, published", "pema_published_interpolation", "tab:cyan"),
    ("PEMA", "pema", "tab:blue"),
)


def draw(report: dict[str, Any], trained: dict[str, Any], path: Path) -> None:
    """Draw a report and its training history, and write the picture to `path`."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    bleu, chrf, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.6])
    _bars(bleu, report, "bleu", "BLEU")
    _bars(chrf, report, "chrf", "chrF")
    history = [Epoch(**epoch) for epoch in trained["history"]]
    draw_training(curves, history, report["validation_nll"]["plm"])
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, report: dict[str, Any], key: str, title: str) -> None:
    names, rows, colours = zip(*(bar for bar in _BARS if bar[1] in report), strict=True)
    container = axes.bar(names, [report[row][key] for row in rows], color=colours)
    axes.bar_label(container, fmt="%.1f")
    axes.set(title=f"{title}, 200 test sentences")
    axes.tick_params(axis="x", labelsize=8)
