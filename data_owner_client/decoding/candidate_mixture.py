"""The mixture over the candidate vocabulary, with the exact argmax over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.interpolation import mix


@dataclass(frozen=True)
class PlmScores:
    """What is known of the PLM's distribution at N positions.

    Attributes:
        logprob_N_C: log P_PLM of the candidates, float32.
        top1_N: int64, the most probable token of all of V.
        top1_logprob_N: its log-probability.
    """

    logprob_N_C: Tensor
    top1_N: Tensor
    top1_logprob_N: Tensor


@dataclass(frozen=True)
class CandidateMixture:
    """The mixture at N positions, where its probabilities are known without the whole LM head.

    Attributes:
        plm: the PLM's side.
        candidate_ids_C: int64, sorted.
        lambda_N: λ at each position, float64.
        logprob_N_K: float64 [N, C + 1]: of the candidates, less their reluctance; then of the PLM's top-1 where it is
            none of them, else −∞.
    """

    plm: PlmScores
    candidate_ids_C: Tensor
    lambda_N: Tensor
    logprob_N_K: Tensor

    @classmethod
    def of(
        cls,
        plm: PlmScores,
        pema_logprob_N_C: Tensor,
        candidate_ids_C: Tensor,
        lambda_N: Tensor,
        reluctance_C: Tensor | None = None,
    ) -> Self:
        """Of both sides.

        Args:
            plm: the PLM's side.
            pema_logprob_N_C: log P_PEMA of the candidates.
            candidate_ids_C: int64, sorted.
            lambda_N: λ at each position.
            reluctance_C: taken from the log-probability of each candidate, where λ > 0.
        """
        at_N = index_of(plm.top1_N, candidate_ids_C)
        inside_N, at_N = at_N >= 0, at_N.clamp(min=0)
        # Rows that travelled as float16 must not make another candidate seem likelier to the PLM than its own top-1.
        plm_logprob_N_C = plm.logprob_N_C.minimum(plm.top1_logprob_N[:, None])
        rows_N = torch.arange(len(at_N))
        plm_logprob_N_C[rows_N, at_N] = torch.where(inside_N, plm.top1_logprob_N, plm_logprob_N_C[rows_N, at_N])
        mixture_N_C = mix(plm_logprob_N_C, pema_logprob_N_C, lambda_N[:, None])
        if reluctance_C is not None:
            mixture_N_C = mixture_N_C - reluctance_C * (lambda_N > 0)[:, None]
        outside_N = (torch.log1p(-lambda_N) + plm.top1_logprob_N.double()).masked_fill(inside_N, -math.inf)
        return cls(plm, candidate_ids_C, lambda_N, torch.cat([mixture_N_C, outside_N[:, None]], dim=1))

    def most_probable(self) -> Tensor:
        """The most probable token of the mixture over all of V, int64 [N].

        Exact, though only the candidates and the PLM's top-1 are looked at: outside the candidates P_PEMA is 0, so the
        mixture there is (1 − λ)·P_PLM, and of those tokens none exceeds the top-1's.
        """
        at_N = self.logprob_N_K.argmax(dim=-1)
        # Where λ is 0 the PLM decides alone, also between candidates that rounding made equal.
        take_top1_N = (self.lambda_N == 0) | (at_N == len(self.candidate_ids_C))
        at_N = at_N.clamp(max=len(self.candidate_ids_C) - 1)
        return torch.where(take_top1_N, self.plm.top1_N, self.candidate_ids_C[at_N])

    def ids_K(self, row: int) -> Tensor:
        """The tokens that a row of log-probabilities is of."""
        return torch.cat([self.candidate_ids_C, self.plm.top1_N[row, None]])
