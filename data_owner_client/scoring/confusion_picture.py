"""The picture of a classifier's confusions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_owner_client.scoring.classification import OTHER, Confusion

_MOST_NUMBERS = 400
_INCHES_PER_LABEL = 0.32
# With room for the names of a thousand labels, a picture would take gigabytes of memory.
_MOST_NAMES = 100
_INCHES_WITHOUT_NAMES = 12


def draw_confusion(title: str, confusion: Confusion, path: Path) -> None:
    """Write a picture of how often each label was answered with each label, as shares of the label's texts.

    Args:
        title: title of the picture.
        confusion: counts; the last column has the answers that are no label. More than 100 labels go unnamed.
        path: file to write; its ending decides the format.
    """
    from matplotlib.figure import Figure  # slow to import

    counts_L_A = np.array(confusion.counts)
    share_L_A = counts_L_A / np.maximum(counts_L_A.sum(1, keepdims=True), 1)
    has_names = len(confusion.labels) <= _MOST_NAMES
    side = 3 + _INCHES_PER_LABEL * len(confusion.labels) if has_names else _INCHES_WITHOUT_NAMES
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share_L_A, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the label's texts", shrink=0.7)
    if has_names:
        columns = [*confusion.labels, OTHER]
        axes.set_xticks(range(len(columns)), columns, rotation=90, parse_math=False)
        axes.set_yticks(range(len(confusion.labels)), confusion.labels, parse_math=False)
    axes.set(xlabel="answer", ylabel="label")
    if counts_L_A.size <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts_L_A):
            color = "white" if share_L_A[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize="small")
    figure.suptitle(title, parse_math=False)  # names may hold dollar signs
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
