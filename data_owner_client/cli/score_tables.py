"""Tables of scores on standard output: each kind of task has its own metrics and details."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from data_owner_client.runtime.console import print_table

if TYPE_CHECKING:
    from data_owner_client.evaluation.comparison.results import Comparison
    from data_owner_client.evaluation.details import Details
    from data_owner_client.evaluation.evaluate import AnswerScores, Evaluation
    from data_owner_client.scoring.calibration import Calibration
    from data_owner_client.scoring.scorer import Metric

# Answers to a chat that are shown side by side.
_SIDE_BY_SIDE = 3


def print_scores(scores: AnswerScores, *, title: str) -> None:
    """Show scores of answers from a file as tables."""
    table = Table(*_titles(scores.metrics), title=title)
    table.add_row(*_values(scores.metrics, scores.scores))
    print_table(table, *_signatures(scores.signatures))
    if scores.details is not None:
        _print_details(scores.details)


def print_evaluation(evaluation: Evaluation, *, title: str) -> None:
    """Show scores of the PLM alone and with the adapter as tables."""
    metrics, perplexity = evaluation.metrics, evaluation.perplexity
    table = Table("", *_titles(metrics), "perplexity", title=title)
    for name, scores, value in (
        ("PLM alone", evaluation.plm, perplexity and perplexity.plm),
        ("PLM + adapter", evaluation.pema, perplexity and perplexity.mixture),
    ):
        table.add_row(name, *_values(metrics, scores), "–" if value is None else f"{value:.2f}")
    table.add_row("p of the difference", *(f"{evaluation.p_values[key]:.3f}" for key in metrics), "")
    if perplexity is not None and perplexity.pema_covered is not None:
        covered = f"the {perplexity.coverage:.1%} of tokens that it covers"
        table.caption = f"Perplexity of the adapter alone, on {covered}: {perplexity.pema_covered:.2f}."
    print_table(table, *_signatures(evaluation.signatures))
    if evaluation.pema_details is not None:
        _print_details(evaluation.pema_details)
    if evaluation.kind == "chat":
        _print_side_by_side(evaluation)


def print_comparison(comparison: Comparison, *, title: str) -> None:
    """Show scores of all systems as a table."""
    from data_owner_client.evaluation.comparison.report import number

    metrics, baselines = comparison.metrics, comparison.baselines
    p_titles = [f"p against {name}" for name in baselines]
    table = Table("", *_titles(metrics), "perplexity", *p_titles, "training s", title=title)
    for row in comparison.rows:
        p_values = (number(row.p_values.get(name, {}).get(comparison.headline), 3) for name in baselines)
        table.add_row(
            row.name, *_values(metrics, row.scores), number(row.ppl, 2), *p_values, number(row.train_seconds, 0)
        )
    headline = metrics[comparison.headline].title
    table.caption = f"p of the difference in {headline}, by paired bootstrap"
    print_table(table, *_signatures(comparison.signatures))


def _titles(metrics: Mapping[str, Metric]) -> list[str]:
    return [metric.title for metric in metrics.values()]


def _values(metrics: Mapping[str, Metric], scores: Mapping[str, float]) -> list[str]:
    return [metric.text(scores[key]) for key, metric in metrics.items()]


def _signatures(signatures: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(signatures.values()))


def _print_details(details: Details) -> None:
    from data_owner_client.evaluation.details import ExtractionDetails

    if isinstance(details, ExtractionDetails):
        fields = Table("field", "texts", "accuracy", "F1", title="Answers by field")
        for field in details.fields:
            fields.add_row(field.field, str(field.count), f"{field.accuracy:.1f}", f"{field.f1:.1f}")
        print_table(fields)
        return
    labels = Table("label", "texts", "precision", "recall", "F1", title="Answers by label")
    shown = [row for row in details.labels if row.count]
    for row in shown:
        labels.add_row(row.label, str(row.count), f"{row.precision:.1f}", f"{row.recall:.1f}", f"{row.f1:.1f}")
    if hidden := len(details.labels) - len(shown):
        labels.caption = f"{hidden:,} other labels have no text."
    print_table(labels)
    if details.calibration is not None:
        _print_calibration(details.calibration)


def _print_calibration(calibration: Calibration) -> None:
    table = Table("confidence", "texts", "mean confidence", "right", title="Calibration of the labels' probabilities")
    for each in calibration.bins:
        if each.count:
            interval = f"{each.above:.0%} to {each.up_to:.0%}"
            table.add_row(interval, str(each.count), f"{each.confidence:.1%}", f"{each.accuracy:.1%}")
    table.caption = (
        f"Expected calibration error {calibration.expected_calibration_error:.3f}, Brier score "
        f"{calibration.brier:.3f}, log loss {calibration.log_loss:.3f} nats."
    )
    print_table(table)


def _print_side_by_side(evaluation: Evaluation) -> None:
    table = Table("turn", "PLM alone", "PLM + adapter", "reference", title="Side by side", show_lines=True)
    columns = (evaluation.sources, evaluation.plm_texts, evaluation.pema_texts, evaluation.targets)
    for row in zip(*(texts[:_SIDE_BY_SIDE] for texts in columns), strict=True):
        table.add_row(*row)
    print_table(table)
