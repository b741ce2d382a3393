"""Tables of the comparisons of all systems."""

from __future__ import annotations

from collections.abc import Sequence

from data_owner_client.evaluation.comparison.report import markdown, number
from data_owner_client.evaluation.comparison.results import BEST, CHOSEN_EXAMPLES, PLM, PUBLISHED, Comparison

_SYSTEMS = (PLM, CHOSEN_EXAMPLES, PUBLISHED, "knn_lm", "private", BEST, "offsite_emulator", "offsite", "lora", "full")
_BASELINES = (CHOSEN_EXAMPLES, PUBLISHED)


def tables(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Markdown of the headline metric of the systems on every task, and of each comparison as a whole."""
    whole = "\n\n".join(markdown(each).replace("# ", "### ", 1).strip() for each in comparisons)
    return {"comparison-headlines": _headlines(comparisons), "comparison-tables": whole or "Nothing was measured."}


def _headlines(comparisons: Sequence[Comparison]) -> str:
    """A row for each task, and a column for each system; p-values are those of our best system."""
    titles = [*(f"`{name}`" for name in _SYSTEMS), *(f"p, `{BEST}` and `{name}`" for name in _BASELINES)]
    lines = [f"| task | kind | metric | {' | '.join(titles)} |", f"|---|---|---|{'--:|' * len(titles)}"]
    for comparison in comparisons:
        key, rows = comparison.headline, {row.name: row for row in comparison.rows}
        metric = comparison.metrics[key]
        cells = [metric.text(rows[name].scores[key] if name in rows else None) for name in _SYSTEMS]
        p_values = rows[BEST].p_values if BEST in rows else {}
        cells += [number(p_values.get(name, {}).get(key), 3) for name in _BASELINES]
        lines.append(f"| {comparison.task} | {comparison.kind} | {metric.title} | {' | '.join(cells)} |")
    return "\n".join(lines)
