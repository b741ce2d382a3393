"""BLEU and chrF, computed by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor


class TextScores(BaseModel):
    """Corpus scores of sacrebleu.

    Attributes:
        bleu: corpus BLEU, 0 to 100.
        chrf: corpus chrF, 0 to 100.
        bleu_signature: sacrebleu's signature of the BLEU settings; scores compare only under equal signatures.
        chrf_signature: sacrebleu's signature of the chrF settings.
    """

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def text_scores(hypotheses: Sequence[str], references: Sequence[str]) -> TextScores:
    """Corpus BLEU and chrF of hypotheses, with one reference each."""
    import sacrebleu  # slow to import

    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)])
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)])
    return TextScores(
        bleu=bleu_score.score,
        chrf=chrf_score.score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Tensor:
    """Sentence-level chrF of each hypothesis, float64, 0 to 100."""
    import sacrebleu  # slow to import

    chrf, pairs = sacrebleu.CHRF(), zip(hypotheses, references, strict=True)
    return torch.tensor([chrf.sentence_score(text, [reference]).score for text, reference in pairs]).double()
