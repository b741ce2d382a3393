"""Likelihood of held-out targets under the PLM and under an adapter, with the features of a gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.gate import gate_features
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.token_logprobs import token_logprobs
from data_owner_client.training.validation import ValidationData
from protocol.errors import InvalidData
from protocol.head import LMHead


def plm_target_logprobs(head: LMHead, target_ids_U: Tensor, rows: MemoryRows) -> Tensor:
    """log P_PLM(y) of each row, float64, from head rows and the stored log-sum-exp.

    Args:
        head: LM-head rows of `target_ids_U`.
        target_ids_U: int64, sorted: U token ids that include every target of the rows.
        rows: rows with log-sum-exp.

    Raises:
        InvalidData: the rows were stored without log-sum-exp.
    """
    if rows.logsumexp_N is None:
        raise InvalidData("The validation memory has no log-sum-exp.", hint="Build it again: build-memory --overwrite.")
    index_N = index_of(rows.target_N.long(), target_ids_U)
    return token_logprobs(head, rows.head_input_N_D(), rows.logsumexp_N, index_N)


def pema_logprobs_and_gate_features(
    adapter: CandidateDistribution, held_out: ValidationData, plm_rows: MemoryRows
) -> tuple[Tensor, Tensor]:
    """log P_PEMA(y) of held-out rows, and the features that a gate sees of them.

    Args:
        adapter: gives P_PEMA.
        held_out: N rows as the adapter sees them.
        plm_rows: rows of these targets behind the prompts that the PLM sees, with log-sum-exp.

    Returns:
        log P_PEMA(y) of each row, float64, −∞ where the target is no candidate; and the features of a gate [N, F].

    Raises:
        InvalidData: the rows were stored without log-sum-exp.
    """
    data, logprobs, features = held_out.data, list[Tensor](), list[Tensor]()
    matches_N = torch.ones(len(plm_rows.target_N), dtype=torch.bool)
    if plm_rows.matches_N is not None:
        matches_N = plm_rows.matches_N.bool()  # the rows that `ValidationData` has
    input_N_D, logsumexp_N = plm_rows.head_input_N_D()[matches_N], plm_rows.logsumexp_N
    if logsumexp_N is None:
        raise InvalidData("The validation memory has no log-sum-exp.", hint="Build it again: build-memory --overwrite.")
    logsumexp_N = logsumexp_N[matches_N]
    # Several arrays of this size in float64 exist at a time.
    at_once = max(1, adapter.head.rows_per_chunk() // 8)
    for start in range(0, len(data), at_once):
        rows = slice(start, start + at_once)
        part = data[rows]
        index_B_P = part.previous_N_P
        previous_B_P = torch.where(index_B_P < 0, -1, adapter.candidate_ids_C[index_B_P.clamp(min=0)])
        pema_B_C = adapter.logprobs(part.cr_N_D.float(), previous_B_P)
        target_B = pema_B_C.gather(1, part.label_N.clamp(min=0)[:, None])[:, 0].double()
        logprobs.append(torch.where(part.label_N < 0, -math.inf, target_B))
        plm_B_C = adapter.head.logits(input_N_D[rows].float()) - logsumexp_N[rows, None]
        features.append(gate_features(plm_B_C, pema_B_C, held_out.position_N[rows]))
    return torch.cat(logprobs), torch.cat(features)
