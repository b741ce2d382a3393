"""Selection of the trainings whose distributions an adapter averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.ensemble import AdapterNetwork, Ensemble
from data_owner_client.training.trainer import Trained
from data_owner_client.training.validation import ValidationData, target_logprobs
from protocol.head import LMHead

# Steps of expectation maximisation.
_STEPS = 300
# A member with less of the weight adds little and takes as long as the others.
_LEAST_WEIGHT = 0.05


@dataclass(frozen=True)
class Member:
    """A training that an adapter uses, and the share of its distribution in the average."""

    trained: Trained
    weight: float = 1.0


def network_of(members: Sequence[Member]) -> AdapterNetwork:
    """The network of one member, or the average of several."""
    if len(members) == 1:
        return members[0].trained.adapter
    return Ensemble([member.trained.adapter for member in members], [member.weight for member in members])


def select_members(trainings: Sequence[Trained], limit: int, validation: ValidationData, head: LMHead) -> list[Member]:
    """Return the members of the likeliest average, the heaviest first.

    Args:
        trainings: trainings, the likeliest one first; it becomes a single member.
        limit: number of members, at most.
        validation: held-out rows.
        head: LM-head rows of the candidates.
    """
    if min(limit, len(trainings)) == 1:
        return [Member(trainings[0])]
    logprob_K_N = torch.stack([target_logprobs(trained.adapter, head, validation.data) for trained in trainings])
    weight_K = likeliest_weights(logprob_K_N, validation.plm_logprob_N)
    kept_M = weight_K.topk(min(limit, len(weight_K))).indices
    kept_M = kept_M[weight_K[kept_M] >= min(_LEAST_WEIGHT, weight_K.max().item())]
    weight_M = likeliest_weights(logprob_K_N[kept_M], validation.plm_logprob_N)
    members = [
        Member(trainings[number], weight) for number, weight in zip(kept_M.tolist(), weight_M.tolist(), strict=True)
    ]
    return sorted(members, key=lambda member: -member.weight)


def likeliest_weights(logprob_K_N: Tensor, plm_logprob_N: Tensor) -> Tensor:
    """Weights of K distributions, whose mixture with the PLM is likeliest, float64 [K]; they sum to 1.

    The weights of all K + 1 distributions are found by expectation maximisation, as in Jelinek & Mercer (Interpolated
    Estimation of Markov Source Parameters, 1980). There is one maximum, as the likelihood is concave in the weights.

    Args:
        logprob_K_N: log P_k(y) of each row, float64; −∞ where y is no candidate.
        plm_logprob_N: log P_PLM(y) of each row, float64.
    """
    logprob_J_N = torch.cat([logprob_K_N, plm_logprob_N[None]])
    weight_J = torch.full((len(logprob_J_N),), 1 / len(logprob_J_N), dtype=torch.float64)
    for _ in range(_STEPS):
        weight_J = (weight_J.log()[:, None] + logprob_J_N).softmax(dim=0).mean(dim=1)
    weight_K: Tensor = weight_J[:-1] / weight_J[:-1].sum()
    return weight_K
