"""The interface of a scorer: metrics of the answers of one task, on one set of references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

References = tuple[str, ...]
"""Accepted answers to one text; the first is the target."""


@dataclass(frozen=True)
class Metric:
    """A metric, whose values go from 0 to 100; more is better.

    Attributes:
        title: name in tables.
    """

    title: str

    def text(self, value: float | None) -> str:
        """A value as tables show it; a dash for None."""
        return "–" if value is None else f"{value:.1f}"


class Scorer(Protocol):
    """Scores answers to the texts of one test set, whose references it holds.

    All methods take the answers to the first texts; fewer answers than references are scored against the first of them.

    Attributes:
        metrics: all metrics by key, in the order of tables.
        headline: key of the metric that `train` chooses by and `compare` tests.
        signatures: everything that decides a metric's value besides the texts, by key; may be empty.
    """

    @property
    def metrics(self) -> Mapping[str, Metric]: ...
    @property
    def headline(self) -> str: ...
    @property
    def signatures(self) -> Mapping[str, str]: ...

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Scores of all answers together, by key of the metric."""

    def each(self, answers: Sequence[str]) -> Tensor:
        """The headline metric of each answer [E], float64; more is better."""

    def p_values(self, baseline: Sequence[str], systems: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """For each system, p-values of its difference from the baseline, by key, from paired bootstrap resampling."""


def language_code(language: str | None) -> str:
    """The code of a language such as `de-AT`, without its region; `en` for None."""
    return (language or "en").lower().replace("_", "-").split("-")[0]


def scores_in_words(metrics: Mapping[str, Metric], scores: Mapping[str, float]) -> str:
    """The scores with the metrics' titles, as in "BLEU 31.4, chrF 55.2"."""
    return ", ".join(f"{metrics[key].title} {metrics[key].text(value)}" for key, value in scores.items())
