"""Tables and pictures of the sensitivity study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

from matplotlib.figure import Figure

from benchmarks.sensitivity.measurement import SCHEDULES, Measurement
from benchmarks.sensitivity.points import FACTORS, Point, effort_points
from benchmarks.sensitivity.results import Results
from data_owner_client.decoding.settings import Effort
from data_owner_client.training.validation import LAMBDAS

_NUMERIC = {"rank": "rank R", "kappa": "κ", "pairs": "training pairs", "members": "averaged trainings"}
_TITLES = _NUMERIC | {
    "changes": "trainings with other settings",
    "neighbours": "P_kNN beside the adapter",
    "form": "form",
    "context": "contexts",
    "model": "model",
}
_LOGARITHMIC = ("rank", "pairs", "members")


@dataclass(frozen=True)
class Spread:
    """Measurements of one setting with several seeds."""

    measurements: Sequence[Measurement]

    @property
    def mean(self) -> float:
        """Mean gain, in nats per token."""
        return fmean(each.gain for each in self.measurements)

    @property
    def deviation(self) -> float:
        """Standard deviation of the gain over the seeds, in nats per token; NaN for one seed."""
        gains = [each.gain for each in self.measurements]
        return stdev(gains) if len(gains) > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the gain over the choice of test texts, in nats per token."""
        return fmean(each.standard_error for each in self.measurements)


def tables(results: Results) -> dict[str, str]:
    """Markdown of each factor's table, of the λ schedules', and of the default's figures, by name of the section."""
    tasks = _tasks(results)
    sections = {f"sensitivity-{factor}": _factor_table(results, tasks, factor) for factor in FACTORS}
    sections["sensitivity-default"] = _default_table(results, tasks)
    sections["sensitivity-schedule"] = _schedule_table(results, tasks)
    sections["sensitivity-answers"] = _answers_table(results, tasks)
    sections["sensitivity-redacted"] = _redacted_table(results, tasks)
    sections["sensitivity-efforts"] = _efforts_table(results, tasks)
    sections["sensitivity-source"] = results.source
    return sections


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw a picture of the numeric factors, of contexts and models, and of the λ schedules; return their paths."""
    tasks = _tasks(results)
    return [
        _draw_numeric(results, tasks, folder / "findings-settings.png"),
        _draw_named(results, tasks, folder / "findings-contexts-models.png"),
        _draw_schedules(results, tasks, folder / "findings-schedules.png"),
    ]


def _tasks(results: Results) -> list[str]:
    return list(dict.fromkeys(point.task for point in results))


def _spread(results: Results, point: Point) -> Spread | None:
    """The measurements of a point with all its seeds; None if there is none."""
    found = [results[each] for each in results if replace(each, seed=0) == point]
    return Spread(found) if found else None


def _number(value: float) -> str:
    """A number of nats per token; a question mark for NaN."""
    return "?" if math.isnan(value) else f"{value:.3f}"


def _values(factor: str) -> list[Any]:
    """Values of a factor, the default one included."""
    default = getattr(Point(task=""), factor)
    return list(FACTORS[factor] if default in FACTORS[factor] else (default, *FACTORS[factor]))


def _value_name(factor: str, value: Any) -> str:
    name = f"{value}"
    if value is None:
        name = "residual"
    elif isinstance(value, bool):
        name = "yes" if value else "no"
    return f"**{name}**" if value == getattr(Point(task=""), factor) else name


def _redacted_table(results: Results, tasks: Sequence[str]) -> str:
    """The gain by contexts that show the targets, as they are or redacted, on the tasks that have both."""
    tasks = [task for task in tasks if _spread(results, Point(task=task, context="redacted"))]
    return _factor_table(results, tasks, "context", ("teacher-forced", "redacted", "redacted, reliable"))


def _factor_table(results: Results, tasks: Sequence[str], factor: str, values: Sequence[Any] | None = None) -> str:
    """A row for each value of the factor, or for some values, with the gain on each task."""
    lines = [f"| {_TITLES[factor]} | {' | '.join(tasks)} |", f"|---|{'--:|' * len(tasks)}"]
    for value in values or _values(factor):
        cells = []
        for task in tasks:
            spread = _spread(results, replace(Point(task=task), **{factor: value}))
            cell = "–" if spread is None else f"{spread.mean:.3f} ± {_number(spread.deviation)}"
            if spread is not None and factor == "model":
                cell = f"{cell} of {spread.measurements[0].plm_nll:.2f}"
            cells.append(cell)
        lines.append(f"| {_value_name(factor, value)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _default_table(results: Results, tasks: Sequence[str]) -> str:
    lines = [
        "| task | rows | candidates | coverage | PLM | gain | over seeds | over texts |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for task in tasks:
        spread = _spread(results, Point(task=task))
        if spread is None:
            continue
        first = spread.measurements[0]
        lines.append(
            f"| {task} | {first.rows:,} | {first.candidates:,} | {first.coverage:.0%} | {first.plm_nll:.3f} "
            f"| {spread.mean:.3f} | ± {_number(spread.deviation)} | ± {spread.standard_error:.3f} |"
        )
    return "\n".join(lines)


def _schedule_table(results: Results, tasks: Sequence[str]) -> str:
    """Gain of each schedule with the λ_max that validation chose, and of the paper's."""
    lines = [
        f"| task | {' | '.join(f'{name} (λ_max)' for name in SCHEDULES)} | gradual, λ_max 0.9 |",
        f"|---|{'--:|' * (len(SCHEDULES) + 1)}",
    ]
    for task in tasks:
        spread = _spread(results, Point(task=task))
        if spread is None:
            continue
        cells = []
        for name in SCHEDULES:
            gain = fmean(each.plm_nll - each.nll[name] for each in spread.measurements)
            cells.append(f"{gain:.3f} ({fmean(each.lambda_max[name] for each in spread.measurements):.2f})")
        at = LAMBDAS.index(0.9)
        cells.append(f"{fmean(each.plm_nll - each.curves['gradual'][at] for each in spread.measurements):.3f}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _answers_table(results: Results, tasks: Sequence[str]) -> str:
    """A row for each setting that answered the test sets, with each task's headline metric."""
    measured = [point for point in results if point.schedule is not None and point.effort == "low"]
    if not measured:
        return "Nothing was measured."
    headline = {point.task: results[point].headline for point in measured}
    lines = [
        f"| | {' | '.join(f'{task}, {headline.get(task, chr(8211))}' for task in tasks)} |",
        f"|---|{'--:|' * len(tasks)}",
    ]
    for setting in dict.fromkeys(replace(point, task="") for point in measured):
        found = [replace(setting, task=task) for task in tasks]
        cells = [
            f"{(results[each].scores or {})[headline[each.task]]:.1f}" if each in results else "–" for each in found
        ]
        lines.append(f"| {_setting_name(setting)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _efforts_table(results: Results, tasks: Sequence[str]) -> str:
    """A row for each effort, with each task's headline metric and the rows that the server computed."""
    found = {point: results[point] for point in effort_points(tasks) if point in results}
    tasks = [task for task in tasks if any(point.task == task and point.effort != "low" for point in found)]
    if not tasks:
        return "Nothing was measured."
    titles = {point.task: each.headline for point, each in found.items()}
    lines = [f"| effort | {' | '.join(f'{task}, {titles[task]}' for task in tasks)} |", f"|---|{'--:|' * len(tasks)}"]
    for effort in get_args(Effort):
        cells = []
        for task in tasks:
            each = found.get(Point(task=task, schedule="constant", effort=effort))
            cell = "–" if each is None else f"{(each.scores or {})[each.headline]:.1f}"
            rows = "" if each is None or each.rows_a_token is None else f" ({each.rows_a_token:.1f} rows a token)"
            cells.append(cell + rows)
        lines.append(f"| {effort} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting_name(setting: Point) -> str:
    """The schedule, and the other factors that differ from their defaults, in words."""
    if setting.schedule == "none":
        return "the PLM alone"
    words = [f"{setting.schedule} λ"]
    words += [f"{setting.context} contexts"] if setting.context != Point.context else []
    words += [f"{setting.pairs} pairs"] if setting.pairs != Point.pairs else []
    return ", ".join(words)


def _add_legend(figure: Figure) -> None:
    """Add one legend for all parts of a picture, above them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(labels)), fontsize=7)


def _draw_numeric(results: Results, tasks: Sequence[str], path: Path) -> Path:
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, (factor, title) in zip(figure.subplots(1, len(_NUMERIC)), _NUMERIC.items(), strict=True):
        for task in tasks:
            spreads = {
                value: spread
                for value in _values(factor)
                if (spread := _spread(results, replace(Point(task=task), **{factor: value}))) is not None
            }
            means = [each.mean for each in spreads.values()]
            deviations = [each.deviation for each in spreads.values()]
            axes.errorbar(list(spreads), means, yerr=deviations, marker="o", markersize=3, capsize=2, label=task)
        axes.axvline(getattr(Point(task=""), factor), color="tab:gray", linewidth=0.8, linestyle=":")
        axes.set(xlabel=title, xscale="log" if factor in _LOGARITHMIC else "linear")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("gain, nats per token")
    _add_legend(figure)
    figure.savefig(path, dpi=100)
    return path


def _draw_named(results: Results, tasks: Sequence[str], path: Path) -> Path:
    factors = ("context", "model")
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, factor in zip(figure.subplots(1, len(factors)), factors, strict=True):
        values = _values(factor)
        width = 0.8 / max(1, len(tasks))
        for number, task in enumerate(tasks):
            for place, value in enumerate(values):
                spread = _spread(results, replace(Point(task=task), **{factor: value}))
                if spread is not None:
                    label = task if place == 0 else None
                    at = place + width * (number - (len(tasks) - 1) / 2)
                    axes.bar(at, spread.mean, width, yerr=spread.deviation, color=f"C{number}", label=label)
        axes.set_xticks(range(len(values)), [str(value) for value in values], fontsize=7, rotation=15, ha="right")
        axes.set(xlabel=_TITLES[factor])
        axes.axhline(0, color="black", linewidth=0.5)
    figure.axes[0].set_ylabel("gain, nats per token")
    _add_legend(figure)
    figure.savefig(path, dpi=100)
    return path


def _draw_schedules(results: Results, tasks: Sequence[str], path: Path) -> Path:
    figure = Figure(figsize=(2.8 * max(1, len(tasks)), 2.8), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        spread = _spread(results, Point(task=task))
        measurements = spread.measurements if spread else []
        for name in SCHEDULES if measurements else ():
            curves = [[each.plm_nll - nll for nll in each.curves[name]] for each in measurements]
            axes.plot(LAMBDAS, [fmean(values) for values in zip(*curves, strict=True)], label=name)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set(title=task, xlabel="λ_max")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("gain, nats per token")
    _add_legend(figure)
    figure.savefig(path, dpi=100)
    return path
