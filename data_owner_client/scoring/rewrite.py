"""Scores of rewritten and translated texts: BLEU and chrF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data_owner_client.scoring.scorer import Metric, References
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings
from data_owner_client.scoring.text_metrics import bleu_tokenizer

RESAMPLES = 1000
"""Resamples of a paired bootstrap test."""
# Names that sacrebleu's test gives the metrics.
_NAMES = {"bleu": "BLEU", "chrf": "chrF2"}


class RewriteScorer:
    """BLEU and chrF as sacrebleu computes them, with its paired bootstrap test.

    Args:
        references: accepted answers to each text.
        settings: settings of scores.

    Raises:
        InvalidData: the tokenizer that the settings name is not installed.
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"bleu": Metric("BLEU"), "chrf": Metric("chrF")})
    headline = "chrf"

    def __init__(self, references: Sequence[References], settings: ScoringSettings = DEFAULT_SCORING) -> None:
        self._references = references
        self._tokenizer = bleu_tokenizer((text for texts in references for text in texts), settings)

    @property
    def signatures(self) -> dict[str, str]:
        """Sacrebleu's signatures."""
        return {key: str(metric.get_signature()) for key, metric in self._sacrebleu.items()}

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        return {key: float(metric.corpus_score(list(answers), None).score) for key, metric in self._sacrebleu.items()}

    def each(self, answers: Sequence[str]) -> Tensor:
        """Sentence-level chrF of each answer [E], float64."""
        import sacrebleu  # slow to import

        chrf = sacrebleu.CHRF()
        pairs = zip(answers, self._references, strict=False)
        return torch.tensor([chrf.sentence_score(text, list(texts)).score for text, texts in pairs]).double()

    def p_values(self, baseline: Sequence[str], systems: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        from sacrebleu.significance import PairedTest  # slow to import

        named = [(str(number), list(texts)) for number, texts in enumerate([baseline, *systems])]
        test = PairedTest(named, self._sacrebleu, references=None, test_type="bs", n_samples=RESAMPLES)
        _, results = test()
        return [
            {key: float(results[name][number].p_value) for key, name in _NAMES.items()}
            for number in range(1, len(named))
        ]

    @cached_property
    def _sacrebleu(self) -> dict[str, Any]:
        """Sacrebleu's metrics with the references, which take answers to the first of them."""
        import sacrebleu  # slow to import

        # One stream for each reference of a text; texts with fewer of them have None.
        streams = [
            [texts[place] if place < len(texts) else None for texts in self._references]
            for place in range(max(map(len, self._references), default=1))
        ]
        return {
            "bleu": sacrebleu.BLEU(references=streams, tokenize=self._tokenizer),
            "chrf": sacrebleu.CHRF(references=streams),
        }
