"""Scores: BLEU and chrF of texts, perplexities of PLM, adapter and mixture on given targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.gate import gate_features
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.training.validation import ValidationData
from protocol.errors import InvalidData
from protocol.head import LMHead


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
    label_N = index_of(rows.target_N.long(), target_ids_K)
    parts = []
    chunk = head.rows_at_once()
    for input_B_D, label_B in zip(rows.head_input_N_D().split(chunk), label_N.split(chunk), strict=True):
        parts.append(head.logits(input_B_D.float()).gather(1, label_B[:, None])[:, 0].double())
    return (torch.cat(parts) - rows.logsumexp_N.double()).clamp(max=0.0)


def both_sides(adapter: CandidateDistribution, held_out: ValidationData, plm_rows: MemoryRows) -> tuple[Tensor, Tensor]:
    """What the adapter and a gate see of held-out rows.

    Args:
        adapter: N rows' distributions are its.
        held_out: the rows.
        plm_rows: the same rows behind the prompts that the PLM sees, with log-sum-exp.

    Returns:
        log P_PEMA(y) of each row, float64, −∞ where the target is no candidate; and the features of a gate [N, F].
    """
    data, logprobs, features = held_out.data, list[Tensor](), list[Tensor]()
    matches_N = torch.ones(len(plm_rows.target_N), dtype=torch.bool)
    if plm_rows.matches_N is not None:
        matches_N = plm_rows.matches_N.bool()  # as `ValidationData` has them
    input_N_D, logsumexp_N = plm_rows.head_input_N_D()[matches_N], plm_rows.logsumexp_N
    if logsumexp_N is None:
        raise InvalidData("The validation memory has no log-sum-exp.", hint="Build it again: build-memory --overwrite.")
    logsumexp_N = logsumexp_N[matches_N]
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
