"""The spread of the demo's scores over runs in different secret bases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from data_owner_client.runtime.atomic_files import write_atomically

_SCORES = {"bleu": "BLEU", "chrf": "chrF", "ppl": "perplexity"}


def summary(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Least, mean and greatest of each score, the chosen interpolations, and the excess of the longest text."""
    scores = {name: [report["pema"][name] for report in reports] for name in _SCORES}
    return {
        name: {"min": min(values), "mean": fmean(values), "max": max(values), "spread": max(values) - min(values)}
        for name, values in scores.items()
    } | {
        "interpolations": [report["adapter"]["interpolation"] for report in reports],
        "excess_tokens": max(report["excess_tokens"] for report in reports),
        "runs": len(reports),
        "machine": reports[0]["machine"],
    }


def write(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the summary as JSON."""
    write_atomically(path, (json.dumps(summary(reports), indent=1) + "\n").encode())


def table(reports: Sequence[dict[str, Any]]) -> Table:
    """The scores and choices of each run, and the spread of the scores."""
    shown = Table("run", "λ_max", "length reward", *_SCORES.values(), title="Runs in secret bases of their own")
    for number, report in enumerate(reports, 1):
        chosen = report["adapter"]["interpolation"]
        scores = [f"{report['pema'][name]:.2f}" for name in _SCORES]
        shown.add_row(str(number), f"{chosen['lambda_max']:g}", f"{chosen['length_reward']:g}", *scores)
    whole = summary(reports)
    shown.add_row("greatest − least", "", "", *(f"{whole[name]['spread']:.2f}" for name in _SCORES))
    return shown
