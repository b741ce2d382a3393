"""A comparison as a Markdown table and a plot."""

from __future__ import annotations

from pathlib import Path

from data_owner_client.evaluation.comparison.results import BEST, PLM, PUBLISHED, Comparison

_COLORS = {PLM: "tab:gray", PUBLISHED: "tab:orange", BEST: "tab:green"}


def title_of(comparison: Comparison) -> str:
    """The task, the model and the sizes of a comparison, in one line."""
    pairs = comparison.pairs
    return f"{comparison.task}, {comparison.model}: {pairs['train']:,} pairs, {pairs['test']:,} test texts"


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, with p-values of the headline metric against the baselines."""
    metrics, baselines = comparison.metrics, comparison.baselines
    headline = metrics[comparison.headline].title
    p_titles = [f"p of {headline} against {name}" for name in baselines]
    titles = [
        *(metric.title for metric in metrics.values()),
        *("perplexity", *p_titles, "training s", "peak MB", "adapter MB", "client shows MB", "owner shows MB"),
    ]
    lines = [
        f"# {title_of(comparison)}",
        "",
        f"| system | {' | '.join(titles)} |",
        f"|---|{'--:|' * len(titles)}",
    ]
    for row in comparison.rows:
        values = [
            *(metric.text(row.scores[key]) for key, metric in metrics.items()),
            number(row.ppl, 2),
            *(number(row.p_values.get(name, {}).get(comparison.headline), 3) for name in baselines),
            number(row.train_seconds, 0),
            number(row.peak_rss_mb, 0),
            _megabytes(row.adapter_bytes, 1),
            _megabytes(row.client_discloses, 2),
            _megabytes(row.owner_discloses, 1),
        ]
        lines.append(f"| **{row.name}**: {row.what} | {' | '.join(values)} |")
    return "\n".join([*lines, "", *comparison.signatures.values()]) + "\n"


def draw(comparison: Comparison, path: Path) -> None:
    """Write a bar plot of each metric of all systems."""
    from matplotlib.figure import Figure  # slow to import

    rows, metrics = comparison.rows[::-1], comparison.metrics
    figure = Figure(figsize=(3 + 3.5 * len(metrics), 1.5 + 0.4 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (key, metric) in zip(panels, metrics.items(), strict=True):
        values = [row.scores[key] for row in rows]
        bars = axes.barh([row.name for row in rows], values, color=[_COLORS.get(row.name, "tab:blue") for row in rows])
        axes.bar_label(bars, labels=[metric.text(value) for value in values], padding=3)
        axes.set(xlabel=metric.title, xlim=(0, 1.15 * max(1.0, *values)))
    figure.suptitle(title_of(comparison), parse_math=False)  # names may hold dollar signs
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def number(value: float | None, digits: int) -> str:
    """A number as tables show it; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def _megabytes(size: int | None, digits: int) -> str:
    return number(None if size is None else size / 1e6, digits)
