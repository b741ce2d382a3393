"""Scores of answers to questions: exact match and F1 of tokens, as SQuAD has them."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from data_owner_client.scoring.bootstrap import Statistics, StatisticsScorer, mean
from data_owner_client.scoring.scorer import Metric, References, language_code
from data_owner_client.scoring.scripts import tokens_of

# English as in SQuAD's evaluation (v1.1), German and Spanish as in that of MLQA (Lewis et al. 2020).
_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "fr": r"\b(un|une|des|le|la|les)\b",
    "it": r"\b(un|uno|una|il|lo|la|i|gli|le)\b",
    "nl": r"\b(een|de|het)\b",
    "pt": r"\b(um|uma|uns|umas|o|a|os|as)\b",
}
# Elided articles, whose apostrophe would go with the punctuation: l'eau.
_ELIDED = {"fr": r"\bl['’]", "it": r"\b(?:l|un|gl)['’]"}
_NOTHING = r"(?!)"
_PUNCTUATION = frozenset(string.punctuation)


class AnswerScorer(StatisticsScorer):
    """Exact match and F1 of tokens, each the best over a text's references, and their means over texts.

    Both compare normalised texts: lower case, no punctuation, no articles, single spaces, as in SQuAD's evaluation
    (Rajpurkar et al. 2016). Punctuation is that of Unicode, as in MLQA's evaluation (Lewis et al. 2020).

    Args:
        references: right answers to each text.
        language: language of the answers, such as `de` or `de-AT`, for its articles; None for English.
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"exact_match": Metric("exact match"), "f1": Metric("F1")})
    headline = "f1"

    def __init__(self, references: Sequence[References], language: str | None = None) -> None:
        self._language = language_code(language)
        self._tokens = [[answer_tokens(text, self._language) for text in texts] for texts in references]

    @property
    def signatures(self) -> dict[str, str]:
        """The language whose articles do not count."""
        return {"f1": f"language:{self._language}" if self._language in _ARTICLES else "language:none"}

    def each(self, answers: Sequence[str]) -> Tensor:
        """F1 of each answer [E], float64, 0 to 100."""
        return torch.tensor([f_score for _, f_score in self._pairs(answers)], dtype=torch.float64)

    def statistics(self, answers: Sequence[str]) -> dict[str, Statistics]:
        exact_E, f1_E = zip(*self._pairs(answers), strict=True)
        return {"exact_match": mean(exact_E), "f1": mean(f1_E)}

    def _pairs(self, answers: Sequence[str]) -> list[tuple[float, float]]:
        """Exact match and F1 of each answer."""
        scores = []
        for answer, references in zip(answers, self._tokens, strict=False):
            tokens = answer_tokens(answer, self._language)
            exact = 100.0 * any(tokens == right for right in references)
            scores.append((exact, max(_f1(tokens, right) for right in references)))
        return scores


def answer_tokens(text: str, language: str) -> list[str]:
    """The tokens of a normalised answer; characters of scripts without spaces are tokens.

    Args:
        text: the answer.
        language: language code without a region, for the articles; none are removed for languages without an entry.
    """
    text = re.sub(_ELIDED.get(language, _NOTHING), " ", text.lower())
    text = "".join(character for character in text if not _is_punctuation(character))
    return tokens_of(re.sub(_ARTICLES.get(language, _NOTHING), " ", text))


def _f1(answer: list[str], right: list[str]) -> float:
    """F1 of tokens as multisets, 0 to 100; 100 if both have none."""
    if not answer or not right:
        return 100.0 * (answer == right)
    shared = (Counter(answer) & Counter(right)).total()
    return 200 * shared / (len(answer) + len(right))


@cache
def _is_punctuation(character: str) -> bool:
    return character in _PUNCTUATION or unicodedata.category(character)[0] == "P"
