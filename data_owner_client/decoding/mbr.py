"""Minimum Bayes risk: of several texts the one that is most like all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import sacrebleu


def rank_by_expected_chrf(texts: Sequence[str], ended: Sequence[bool]) -> list[int]:
    """The texts' numbers, that with the highest mean chrF against all texts first.

    Drawn texts stand for the references that there might be, so this is the text of the highest expected chrF (minimum
    Bayes risk decoding: Kumar & Byrne, NAACL 2004; with draws: Eikema & Aziz, COLING 2020, arXiv 2005.10283). The most
    probable text is often a worse one: of many good texts each has little probability, and one that stops early or goes
    astray may have more than any.

    Texts that came to no end come last, and none is measured against them: they repeat themselves, and two of them are
    most like each other. If none ended, they are ordered as the others would be.

    Args:
        texts: of one input.
        ended: of each, whether it came to an end by itself.
    """
    if not any(ended):
        ended = [True] * len(texts)
    counts = Counter(text for text, whole in zip(texts, ended, strict=True) if whole)
    metric = sacrebleu.CHRF()

    def gain(text: str) -> float:
        return sum(count * float(metric.sentence_score(text, [other]).score) for other, count in counts.items())

    gains = {text: gain(text) for text in set(texts)}
    return sorted(range(len(texts)), key=lambda number: (not ended[number], -gains[texts[number]]))
