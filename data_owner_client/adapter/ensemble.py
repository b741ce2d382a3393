"""An average of adapters: P_PEMA = Σ_k w_k·P_k over the members, which share candidates and head rows.

Networks that were trained apart err apart, so their average is likelier than each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from data_owner_client.adapter.network import Adapter
from protocol.head import LMHead


class Ensemble(nn.Module):
    """Adapters of any forms and ranks, and the weight of each.

    Args:
        members: K adapters of the same hidden size.
        weights: positive weight of each; they sum to 1.
    """

    def __init__(self, members: Sequence[Adapter], weights: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = tuple(weights)

    @property
    def adapters(self) -> list[Adapter]:
        """The members."""
        return [cast(Adapter, member) for member in self.members]

    def logprobs(self, head: LMHead, cr_N_D: Tensor, previous_N_P: Tensor, matches_N: Tensor | None = None) -> Tensor:
        """log Σ_k w_k·P_k over the candidates [N, C], float32; see `Adapter.logprobs`."""
        logprobs = [adapter.logprobs(head, cr_N_D, previous_N_P, matches_N) for adapter in self.adapters]
        return mean_logprob(logprobs, self.weights)


AdapterNetwork = Adapter | Ensemble
"""Type of an adapter's network, whose `logprobs` are log P_PEMA: a single one, or an average."""


def mean_logprob(logprobs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log Σ_k w_k·P_k of K log-probabilities with one shape; −∞ where all are."""
    shares = (logprob + math.log(weight) for logprob, weight in zip(logprobs, weights, strict=True))
    return reduce(torch.logaddexp, shares)
