"""BLEU and chrF by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

import sacrebleu
import torch
from pydantic import BaseModel
from torch import Tensor


class TextScores(BaseModel):
    """Corpus scores as sacrebleu computes them, with the signatures that make them comparable."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def text_scores(hypotheses: Sequence[str], references: Sequence[str]) -> TextScores:
    """BLEU and chrF of hypotheses against one reference each."""
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
    """chrF of each hypothesis by itself, float64 from 0 to 100."""
    chrf, pairs = sacrebleu.CHRF(), zip(hypotheses, references, strict=True)
    return torch.tensor([chrf.sentence_score(text, [reference]).score for text, reference in pairs]).double()
