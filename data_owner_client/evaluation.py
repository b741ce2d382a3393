"""Scores: BLEU and chrF of texts, perplexities of PLM, adapter and mixture on given targets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sacrebleu
import torch
from pydantic import BaseModel
from torch import Tensor

from data_owner_client.adapter import Adaptation
from data_owner_client.decoding.interpolation import Interpolation
from data_owner_client.memory.store import MemoryRows
from data_owner_client.plm import RemotePlm, token_set
from data_owner_client.training import Batch, ValidationData
from protocol.errors import InvalidData
from protocol.head import LMHead


class TextScores(BaseModel):
    """Corpus scores as sacrebleu computes them, with the signatures that make them comparable."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


class Perplexities(BaseModel):
    """exp of the mean negative log-likelihood per target token, the stop included.

    Attributes:
        plm: of the PLM alone.
        mixture: of (1 − λ_t)·P_PLM + λ_t·P_PEMA.
        pema_covered: of the adapter alone, on the tokens that are candidates; the others have probability 0. None if
            there are no such tokens.
        coverage: share of tokens that are candidates.
        tokens: how many tokens were counted.
    """

    plm: float
    mixture: float
    pema_covered: float | None
    coverage: float
    tokens: int


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


def plm_target_logprobs(head: LMHead, target_ids_K: Tensor, rows: MemoryRows) -> Tensor:
    """log P_PLM(y) of each row, float64, from head rows and the stored log-sum-exp.

    Args:
        head: head rows of `target_ids_K`.
        target_ids_K: int64, sorted; every target of the rows is among them.
        rows: of a validation memory.

    Raises:
        InvalidData: the rows were stored without log-sum-exp.
    """
    if rows.logsumexp_N is None:
        raise InvalidData("The validation memory has no log-sum-exp.", hint="Build it again: build-memory --overwrite.")
    label_N = torch.searchsorted(target_ids_K, rows.target_N.long())
    parts = []
    chunk = head.rows_at_once()
    for input_B_D, label_B in zip(rows.head_input_N_D().split(chunk), label_N.split(chunk), strict=True):
        parts.append(head.logits(input_B_D.float()).gather(1, label_B[:, None])[:, 0].double())
    return (torch.cat(parts) - rows.logsumexp_N.double()).clamp(max=0.0)


def _target_logprobs(adapter: Adaptation, data: Batch) -> Tensor:
    """log P_PEMA(y) of each row, float64; −∞ where the target is no candidate."""
    parts = []
    for start in range(0, len(data), adapter.head.rows_at_once()):
        part = data[start : start + adapter.head.rows_at_once()]
        before_B_K = part.previous_N_K
        previous_B_K = torch.where(before_B_K < 0, -1, adapter.candidate_ids_C[before_B_K.clamp(min=0)])
        logprob_B_C = adapter.logprobs(part.cr_N_D.float(), previous_B_K).double()
        chosen_B = logprob_B_C.gather(1, part.label_N.clamp(min=0)[:, None])[:, 0]
        parts.append(torch.where(part.label_N < 0, -math.inf, chosen_B))
    return torch.cat(parts)


def perplexities(
    plm: RemotePlm,
    adapter: Adaptation,
    rows: MemoryRows,
    interpolation: Interpolation,
    nearest: MemoryRows | None = None,
) -> Perplexities:
    """Perplexities on teacher-forced rows with log-sum-exp.

    Args:
        plm: gives head rows.
        adapter: of which, too.
        rows: behind the task's prompts.
        interpolation: of the mixture.
        nearest: the same targets behind the prompts that the PLM sees in the mixture, where these are others.
    """
    target_ids_K = token_set([rows.target_N])
    head = plm.head_rows(target_ids_K)
    plm_logprob_N = plm_target_logprobs(head, target_ids_K, rows)
    mixed_logprob_N = plm_logprob_N if nearest is None else plm_target_logprobs(head, target_ids_K, nearest)
    data = Batch.of(rows, adapter.candidate_ids_C)
    pema_logprob_N = _target_logprobs(adapter, data)
    held_out = ValidationData.of(rows, adapter.candidate_ids_C, mixed_logprob_N, adapter.card.length_ratio)
    covered_N = data.label_N >= 0
    return Perplexities(
        plm=math.exp(-plm_logprob_N.mean().item()),
        mixture=math.exp(held_out.mixture_nll(pema_logprob_N, interpolation)),
        pema_covered=math.exp(-pema_logprob_N[covered_N].mean().item()) if bool(covered_N.any()) else None,
        coverage=covered_N.float().mean().item(),
        tokens=len(plm_logprob_N),
    )
