"""Tables of the comparisons of all systems."""

from __future__ import annotations

from collections.abc import Sequence

from data_owner_client.evaluation.comparison.report import markdown
from data_owner_client.evaluation.comparison.results import Comparison, ComparisonRow


def tables(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Markdown of the headline metric of every system on every task, and of each comparison as a whole."""
    whole = "\n\n".join(markdown(each).replace("# ", "### ", 1).strip() for each in comparisons)
    return {"comparison-headlines": _headlines(comparisons), "comparison-tables": whole or "Nothing was measured."}


def _headlines(comparisons: Sequence[Comparison]) -> str:
    """A row for each system, and a column for each task."""
    titles = [f"{each.task}, {each.metrics[each.headline].title}" for each in comparisons]
    lines = [f"| system | {' | '.join(titles)} |", f"|---|{'--:|' * len(titles)}"]
    rows = [{row.name: row for row in each.rows} for each in comparisons]
    for name in dict.fromkeys(name for each in rows for name in each):
        cells = [_cell(comparison, of_task.get(name)) for comparison, of_task in zip(comparisons, rows, strict=True)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(comparison: Comparison, row: ComparisonRow | None) -> str:
    """The headline metric."""
    key = comparison.headline
    return "–" if row is None else comparison.metrics[key].text(row.scores[key])
