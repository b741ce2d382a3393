"""Selection of the trainings whose distributions an adapter averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.ensemble import AdapterNetwork, Ensemble
from data_owner_client.adapter.network import Adapter
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.validation import ValidationData, target_logprobs
from protocol.head import LMHead

# Steps of expectation maximisation; the loss changes in its sixth digit after far fewer.
_STEPS = 300
# A member with less of the weight adds little and takes as long as the others.
_LEAST_WEIGHT = 0.05


@dataclass(frozen=True)
class Member:
    """A training that an adapter uses.

    Attributes:
        settings: its settings.
        adapter: its network.
        weight: share of its distribution in the average.
    """

    settings: TrainingSettings
    adapter: Adapter
    weight: float = 1.0


def network_of(members: Sequence[Member]) -> AdapterNetwork:
    """The network of one member, or the average of several."""
    if len(members) == 1:
        return members[0].adapter
    return Ensemble([member.adapter for member in members], [member.weight for member in members])


def select_members(
    trainings: Sequence[tuple[TrainingSettings, Adapter]], limit: int, validation: ValidationData, head: LMHead
) -> list[Member]:
    """Return the members of the likeliest average, the heaviest first.

    A single member is the likeliest training.

    Args:
        trainings: settings and adapter of each training.
        limit: number of members, at most.
        validation: held-out rows.
        head: LM-head rows of the candidates.
    """
    logprobs = [target_logprobs(adapter, head, validation.data) for _, adapter in trainings]
    if limit == 1:
        losses = [validation.best(logprob_N, "constant")[1] for logprob_N in logprobs]
        settings, adapter = trainings[losses.index(min(losses))]
        return [Member(settings, adapter)]
    logprob_K_N = torch.stack(logprobs)
    weight_K = likeliest_weights(logprob_K_N, validation.plm_logprob_N)
    kept_M = weight_K.topk(min(limit, len(weight_K))).indices
    kept_M = kept_M[weight_K[kept_M] >= min(_LEAST_WEIGHT, weight_K.max().item())]
    weight_M = likeliest_weights(logprob_K_N[kept_M], validation.plm_logprob_N)
    members = []
    for number, weight in zip(kept_M.tolist(), weight_M.tolist(), strict=True):
        settings, adapter = trainings[number]
        members.append(Member(settings, adapter, weight))
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
