"""Scores of summaries: ROUGE as its authors' package computes it, and chrF."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data_owner_client.scoring.bootstrap import Statistics, StatisticsScorer, mean
from data_owner_client.scoring.rewrite import CHRF, ChatScorer
from data_owner_client.scoring.scorer import Metric, References, language_code
from data_owner_client.scoring.scripts import words_of
from protocol.errors import Unsupported

_ROUGE = ("rouge1", "rouge2", "rougeL")


class SummaryScorer(StatisticsScorer):
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), means over texts, with chrF beside them.

    Each is the best over a text's references. Tokens are words in lower case, and characters in scripts without spaces.
    English words are stemmed, as is customary.

    Args:
        references: accepted summaries of each text.
        language: language of the summaries, such as `de` or `de-AT`; None for English.

    Raises:
        Unsupported: the package rouge-score is not installed.
    """

    metrics: Mapping[str, Metric] = MappingProxyType(
        {"rouge1": Metric("ROUGE-1"), "rouge2": Metric("ROUGE-2"), "rougeL": Metric("ROUGE-L"), "chrf": CHRF}
    )
    headline = "rougeL"

    def __init__(self, references: Sequence[References], language: str | None = None) -> None:
        try:
            from nltk.stem.porter import PorterStemmer  # slow to import
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise Unsupported(
                "ROUGE needs the package rouge-score.", hint="Run: pip install -e '.[client,summaries]'"
            ) from error
        self._references = references
        self._stemmer = PorterStemmer() if language_code(language) == "en" else None
        self._rouge = RougeScorer(_ROUGE, tokenizer=_Words(self._stemmer))
        self._chrf = ChatScorer(references)

    @property
    def signatures(self) -> dict[str, str]:
        """The form of ROUGE, and sacrebleu's signature of chrF."""
        from importlib.metadata import version

        stem = "yes" if self._stemmer else "no"
        return {
            "rougeL": f"measure:f|stem:{stem}|tok:unicode|version:{version('rouge-score')}",
            **self._chrf.signatures,
        }

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        return super().scores(answers) | self._chrf.scores(answers)

    def each(self, answers: Sequence[str]) -> Tensor:
        """ROUGE-L of each answer [E], float64, 0 to 100."""
        return torch.tensor([scores[-1] for scores in self._of_each(answers)], dtype=torch.float64)

    def p_values(self, baseline: Sequence[str], systems: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        of_chrf = self._chrf.p_values(baseline, systems)
        return [rouge | chrf for rouge, chrf in zip(super().p_values(baseline, systems), of_chrf, strict=True)]

    def statistics(self, answers: Sequence[str]) -> dict[str, Statistics]:
        """Statistics of ROUGE, by key. chrF comes from sacrebleu."""
        return dict(zip(_ROUGE, map(mean, zip(*self._of_each(answers), strict=True)), strict=True))

    def _of_each(self, answers: Sequence[str]) -> list[list[float]]:
        """ROUGE of each answer, 0 to 100, in the order of the keys."""
        pairs = zip(answers, self._references, strict=False)
        scores = [self._rouge.score_multi(list(texts), answer) for answer, texts in pairs]
        return [[100 * score[key].fmeasure for key in _ROUGE] for score in scores]


class _Words:
    """A tokenizer for rouge-score, whose own leaves out all but a to z and 0 to 9.

    Args:
        stemmer: nltk's stemmer; None for words as they are.
    """

    def __init__(self, stemmer: Any | None) -> None:
        self._stemmer = stemmer

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in lower case."""
        words = words_of(unicodedata.normalize("NFC", text).lower())
        if self._stemmer is None:
            return words
        # Shorter words stay whole, as with rouge-score's own tokenizer.
        return [self._stemmer.stem(word) if len(word) > 3 else word for word in words]
