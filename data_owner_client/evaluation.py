"""Scores: BLEU and chrF of texts, perplexities of PLM, adapter and mixture on given targets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sacrebleu
import torch
from pydantic import BaseModel
from torch import Tensor

from data_owner_client.adapter import Adaptation
from data_owner_client.candidates import places, token_set
from data_owner_client.decoding.gate import gate_features
from data_owner_client.decoding.interpolation import Interpolation, mix
from data_owner_client.memory.store import MemoryRows
from data_owner_client.plm import RemotePlm
from data_owner_client.training import ValidationData
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


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Tensor:
    """chrF of each hypothesis by itself, float64 from 0 to 100."""
    chrf, pairs = sacrebleu.CHRF(), zip(hypotheses, references, strict=True)
    return torch.tensor([chrf.sentence_score(text, [reference]).score for text, reference in pairs]).double()


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
    label_N = places(rows.target_N.long(), target_ids_K)
    parts = []
    chunk = head.rows_at_once()
    for input_B_D, label_B in zip(rows.head_input_N_D().split(chunk), label_N.split(chunk), strict=True):
        parts.append(head.logits(input_B_D.float()).gather(1, label_B[:, None])[:, 0].double())
    return (torch.cat(parts) - rows.logsumexp_N.double()).clamp(max=0.0)


def both_sides(adapter: Adaptation, held_out: ValidationData, plm_rows: MemoryRows) -> tuple[Tensor, Tensor]:
    """What the adapter and a gate see of held-out rows.

    Args:
        adapter: N rows' distributions are its.
        held_out: the rows.
        plm_rows: the same rows behind the prompts that the PLM sees, with log-sum-exp.

    Returns:
        log P_PEMA(y) of each row, float64, −∞ where the target is no candidate; and the features of a gate [N, F].
    """
    data, logprobs, features = held_out.data, list[Tensor](), list[Tensor]()
    agrees_N = torch.ones(len(plm_rows.target_N), dtype=torch.bool)
    if plm_rows.agrees_N is not None:
        agrees_N = plm_rows.agrees_N.bool()  # as `ValidationData` has them
    input_N_D, logsumexp_N = plm_rows.head_input_N_D()[agrees_N], plm_rows.logsumexp_N
    if logsumexp_N is None:
        raise InvalidData("The validation memory has no log-sum-exp.", hint="Build it again: build-memory --overwrite.")
    logsumexp_N = logsumexp_N[agrees_N]
    # In float64, and several of them at a time.
    at_once = max(1, adapter.head.rows_at_once() // 8)
    for start in range(0, len(data), at_once):
        rows = slice(start, start + at_once)
        part = data[rows]
        before_B_K = part.previous_N_K
        previous_B_K = torch.where(before_B_K < 0, -1, adapter.candidate_ids_C[before_B_K.clamp(min=0)])
        pema_B_C = adapter.logprobs(part.cr_N_D.float(), previous_B_K)
        chosen_B = pema_B_C.gather(1, part.label_N.clamp(min=0)[:, None])[:, 0].double()
        logprobs.append(torch.where(part.label_N < 0, -math.inf, chosen_B))
        plm_B_C = adapter.head.logits(input_N_D[rows].float()) - logsumexp_N[rows, None]
        features.append(gate_features(plm_B_C, pema_B_C, held_out.position_N[rows]))
    return torch.cat(logprobs), torch.cat(features)


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
    data = ValidationData.of(rows, adapter.candidate_ids_C, mixed_logprob_N, adapter.card.length_ratio)
    pema_logprob_N, features_N_F = both_sides(adapter, data, nearest or rows)
    if interpolation.gate is None:
        lambda_N = interpolation.weights(data.position_N, data.horizon_N)
    else:
        lambda_N = interpolation.gate.lambdas(features_N_F)
    covered_N = data.data.label_N >= 0
    return Perplexities(
        plm=math.exp(-plm_logprob_N.mean().item()),
        mixture=math.exp(-mix(mixed_logprob_N, pema_logprob_N, lambda_N).mean().item()),
        pema_covered=math.exp(-pema_logprob_N[covered_N].mean().item()) if bool(covered_N.any()) else None,
        coverage=covered_N.float().mean().item(),
        tokens=len(plm_logprob_N),
    )
