"""Minimum Bayes risk: ranking of several texts by their likeness to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def rank_by_expected_chrf(texts: Sequence[str], ended: Sequence[bool]) -> list[int]:
    """Indices of the texts, the highest mean chrF against all texts first.

    Drawn texts stand in for possible references, so the first has the highest expected chrF (minimum Bayes risk
    decoding: Kumar & Byrne, NAACL 2004; with draws: Eikema & Aziz, COLING 2020, arXiv 2005.10283). The most probable
    text is often worse. Probability is spread over many good texts, and a text that stops early may have more than any.

    Unfinished texts come last and are never a reference: they repeat themselves, and two of them are very alike. A text
    that was cut by a bound is unfinished, too. If none ended, all are treated as finished.

    Args:
        texts: texts for one input.
        ended: True for each text that ended by a stop.
    """
    # Here, because it takes a moment that most commands need not wait for.
    import sacrebleu

    if not any(ended):
        ended = [True] * len(texts)
    counts = Counter(text for text, whole in zip(texts, ended, strict=True) if whole)
    metric = sacrebleu.CHRF()

    def gain(text: str) -> float:
        return sum(count * float(metric.sentence_score(text, [other]).score) for other, count in counts.items())

    gains = {text: gain(text) for text in set(texts)}
    return sorted(range(len(texts)), key=lambda index: (not ended[index], -gains[texts[index]]))
