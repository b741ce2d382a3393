"""Scores of free text by sacrebleu: BLEU and chrF of rewritten and translated texts, chrF of turns of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data_owner_client.scoring.bleu_tokenizer import bleu_tokenizer
from data_owner_client.scoring.bootstrap import RESAMPLES
from data_owner_client.scoring.scorer import Metric, References
from data_owner_client.scoring.settings import DEFAULT_SCORING, ScoringSettings

CHRF = Metric("chrF")
# Names that sacrebleu's test gives the metrics.
_NAMES = {"bleu": "BLEU", "chrf": "chrF2"}


class ChatScorer:
    """chrF as sacrebleu computes it, with its paired bootstrap test.

    Args:
        references: accepted answers to each text.
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"chrf": CHRF})
    headline = "chrf"

    def __init__(self, references: Sequence[References]) -> None:
        self._references = references

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
        scores = [chrf.sentence_score(text, list(texts)).score for text, texts in pairs]
        return torch.tensor(scores, dtype=torch.float64)

    def p_values(self, baseline: Sequence[str], systems: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """For each system, sacrebleu's p-values of its difference from the baseline.

        They are 1 for equal scores, and for a single text, of which every resample is the same.
        """
        from sacrebleu.significance import PairedTest  # slow to import

        named = [(str(number), list(texts)) for number, texts in enumerate([baseline, *systems])]
        test = PairedTest(named, self._sacrebleu, references=None, test_type="bs", n_samples=RESAMPLES)
        _, results = test()
        scores = [self.scores(texts) for _, texts in named]
        # Sacrebleu's own p-value of equal scores is the smallest there is.
        return [
            {
                key: 1.0
                if len(baseline) == 1 or scores[number][key] == scores[0][key]
                else float(results[_NAMES[key]][number].p_value)
                for key in self.metrics
            }
            for number in range(1, len(named))
        ]

    @cached_property
    def _sacrebleu(self) -> dict[str, Any]:
        """Sacrebleu's metrics with the references, which take answers to the first of them."""
        import sacrebleu  # slow to import

        return {"chrf": sacrebleu.CHRF(references=self._streams())}

    def _streams(self) -> list[list[str | None]]:
        """One stream for each reference of a text, as sacrebleu wants them; texts with fewer have None."""
        return [
            [texts[place] if place < len(texts) else None for texts in self._references]
            for place in range(max(map(len, self._references), default=1))
        ]


class RewriteScorer(ChatScorer):
    """BLEU and chrF as sacrebleu computes them, with its paired bootstrap test.

    Args:
        references: accepted answers to each text.
        settings: settings of scores.

    Raises:
        InvalidData: the tokenizer that the settings name is not installed.
    """

    metrics: Mapping[str, Metric] = MappingProxyType({"bleu": Metric("BLEU"), "chrf": CHRF})

    def __init__(self, references: Sequence[References], settings: ScoringSettings = DEFAULT_SCORING) -> None:
        super().__init__(references)
        self._tokenizer = bleu_tokenizer((text for texts in references for text in texts), settings)

    @cached_property
    def _sacrebleu(self) -> dict[str, Any]:
        import sacrebleu  # slow to import

        bleu = sacrebleu.BLEU(references=self._streams(), tokenize=self._tokenizer)
        return {"bleu": bleu, "chrf": sacrebleu.CHRF(references=self._streams())}
