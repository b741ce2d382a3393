"""A comparison as a Markdown table and a plot."""

from __future__ import annotations

from pathlib import Path

from data_owner_client.evaluation.comparison.results import BEST, PLM, PUBLISHED, ComparisonRow

_COLORS = {PLM: "tab:gray", PUBLISHED: "tab:orange", BEST: "tab:green"}


def markdown(title: str, rows: list[ComparisonRow], signatures: list[str]) -> str:
    """The rows as a Markdown table, with p-values of chrF against the PLM and against PEMA as published."""
    lines = [
        f"# {title}",
        "",
        "| system | BLEU | chrF | perplexity | p (PLM) | p (published) | training s | peak MB | adapter MB "
        "| client shows MB | owner shows MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| **{row.name}**: {row.what} | {row.bleu:.1f} | {row.chrf:.1f} | {_number(row.ppl, 2)} "
        f"| {_number(row.p_value_chrf_vs_plm, 3)} | {_number(row.p_value_chrf_vs_published, 3)} "
        f"| {row.train_seconds:.0f} | {_number(row.peak_rss_mb, 0)} | {_megabytes(row.adapter_bytes, 1)} "
        f"| {_megabytes(row.client_discloses, 2)} | {_megabytes(row.owner_discloses, 1)} |"
        for row in rows
    ]
    return "\n".join([*lines, "", *signatures]) + "\n"


def draw(title: str, rows: list[ComparisonRow], path: Path) -> None:
    """Write a bar plot of BLEU and chrF of all systems."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = [row.name for row in reversed(rows)]
    for part, metric, values in (
        (axes[0], "BLEU", [row.bleu for row in reversed(rows)]),
        (axes[1], "chrF", [row.chrf for row in reversed(rows)]),
    ):
        bars = part.barh(names, values, color=[_COLORS.get(name, "tab:blue") for name in names])
        part.bar_label(bars, fmt="%.1f", padding=3)
        part.set(xlabel=metric, xlim=(0, 1.15 * max(1.0, *values)))
    figure.suptitle(title, parse_math=False)  # names may hold dollar signs
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _megabytes(size: int | None, digits: int) -> str:
    return _number(None if size is None else size / 1e6, digits)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
