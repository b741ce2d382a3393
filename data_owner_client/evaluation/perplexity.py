"""Perplexity of reference texts under the PLM and under the mixture."""

from __future__ import annotations

import math

from pydantic import BaseModel

from data_owner_client.adapter.candidates import token_set
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.likelihood import pema_logprobs_and_gate_features, plm_target_logprobs
from data_owner_client.training.validation import ValidationData


class Perplexities(BaseModel):
    """exp of the mean negative log-likelihood per target token, the stop included.

    Attributes:
        plm: perplexity of the PLM alone.
        mixture: perplexity of (1 − λ_t)·P_PLM + λ_t·P_PEMA.
        pema_covered: perplexity of the adapter alone on the tokens that are candidates, as it gives the others
            probability 0. None if no token is a candidate.
        coverage: share of the tokens that are candidates.
        tokens: number of tokens.
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
    retrieved_rows: MemoryRows | None = None,
) -> Perplexities:
    """Perplexities on teacher-forced rows with log-sum-exp.

    Args:
        plm: the PLM, which gives LM-head rows.
        adapter: gives P_PEMA.
        rows: rows of the targets behind the task's prompts.
        interpolation: interpolation of the mixture.
        retrieved_rows: rows of the targets behind prompts with retrieved examples, which the PLM sees in the mixture;
            None if it sees the task's prompts.

    Raises:
        InvalidData: the rows have no log-sum-exp.
        PemaError: a call to the PLM failed.
    """
    target_ids_U = token_set([rows.target_N])
    head = plm.head_rows(target_ids_U)
    plm_logprob_N = plm_target_logprobs(head, target_ids_U, rows)
    mixed_logprob_N = (
        plm_logprob_N if retrieved_rows is None else plm_target_logprobs(head, target_ids_U, retrieved_rows)
    )
    data = ValidationData.from_rows(rows, adapter.candidate_ids_C, mixed_logprob_N, adapter.card.length_ratio)
    pema_logprob_N, features_N_F = pema_logprobs_and_gate_features(adapter, data, retrieved_rows or rows)
    if interpolation.gate is None:
        lambda_N = interpolation.lambdas(data.position_N, data.expected_length_N)
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
