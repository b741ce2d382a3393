"""Perplexity of reference texts under the PLM and under the mixture."""

from __future__ import annotations

import math

from pydantic import BaseModel

from data_owner_client.adapter.candidates import token_set
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.likelihood import both_sides, plm_target_logprobs
from data_owner_client.training.validation import ValidationData


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


def perplexities(
    plm: RemotePlm,
    adapter: CandidateDistribution,
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
        lambda_N = interpolation.lambdas(data.position_N, data.horizon_N)
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
