"""The mixture over the candidate vocabulary, with the exact argmax over the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.interpolation import mix

# Share of the candidates' probability that rounding may have added to it, when the rest is bounded.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class PlmScores:
    """The PLM's distribution at N positions, without the whole LM head.

    Attributes:
        logprob_N_C: log P_PLM of the candidates, float32.
        top1_N: int64, the most probable token of all of V.
        top1_logprob_N: log P_PLM of that token.
    """

    logprob_N_C: Tensor
    top1_N: Tensor
    top1_logprob_N: Tensor


@dataclass(frozen=True)
class CandidateMixture:
    """The mixture at N positions, over the candidates and the PLM's top-1.

    Attributes:
        plm: the PLM's scores.
        candidate_ids_C: int64, sorted.
        lambda_N: λ at each position, float64.
        logprob_N_K: float64 [N, C + 1]: the candidates, less their stop penalty; then the PLM's top-1, or −∞ where it
            is a candidate.
    """

    plm: PlmScores
    candidate_ids_C: Tensor
    lambda_N: Tensor
    logprob_N_K: Tensor

    @classmethod
    def from_scores(
        cls,
        plm: PlmScores,
        pema_logprob_N_C: Tensor,
        candidate_ids_C: Tensor,
        lambda_N: Tensor,
        stop_penalty_C: Tensor | None = None,
    ) -> Self:
        """Mix the scores of PLM and adapter.

        Args:
            plm: the PLM's scores.
            pema_logprob_N_C: log P_PEMA of the candidates.
            candidate_ids_C: int64, sorted.
            lambda_N: λ at each position.
            stop_penalty_C: nats taken from the log-probability of each candidate, where λ > 0; None for none.
        """
        index_N = index_of(plm.top1_N, candidate_ids_C)
        inside_N, index_N = index_N >= 0, index_N.clamp(min=0)
        # Rows that travelled as float16 must not make another candidate seem likelier to the PLM than its own top-1.
        plm_logprob_N_C = plm.logprob_N_C.minimum(plm.top1_logprob_N[:, None])
        rows_N = torch.arange(len(index_N))
        top1_logprob_N = torch.where(inside_N, plm.top1_logprob_N, plm_logprob_N_C[rows_N, index_N])
        plm_logprob_N_C[rows_N, index_N] = top1_logprob_N
        mixture_N_C = mix(plm_logprob_N_C, pema_logprob_N_C, lambda_N[:, None])
        if stop_penalty_C is not None:
            mixture_N_C = mixture_N_C - stop_penalty_C * (lambda_N > 0)[:, None]
        outside_N = (torch.log1p(-lambda_N) + plm.top1_logprob_N.double()).masked_fill(inside_N, -math.inf)
        return cls(plm, candidate_ids_C, lambda_N, torch.cat([mixture_N_C, outside_N[:, None]], dim=1))

    def most_probable(self) -> Tensor:
        """The most probable token of the mixture over all of V, int64 [N].

        It is exact. Outside the candidates P_PEMA is 0 and the mixture is (1 − λ)·P_PLM, so no other token there
        exceeds the PLM's top-1.
        """
        index_N = self.logprob_N_K.argmax(dim=-1)
        # Where λ is 0 the PLM decides alone, also between candidates that rounding made equal.
        top1_logprob_N = self.logprob_N_K.gather(1, self._index_of_top1()[:, None])[:, 0]
        plm_decides_N = (self.lambda_N == 0) & (top1_logprob_N > -math.inf)
        take_top1_N = plm_decides_N | (index_N == len(self.candidate_ids_C))
        index_N = index_N.clamp(max=len(self.candidate_ids_C) - 1)
        return torch.where(take_top1_N, self.plm.top1_N, self.candidate_ids_C[index_N])

    def held(self, allowed: Sequence[Tensor | None]) -> CandidateMixture:
        """The mixture over the allowed tokens alone; the others have −∞.

        Args:
            allowed: True for each allowed token, bool [V], at each position; None for all.
        """
        if all(allowed_V is None for allowed_V in allowed):
            return self
        logprob_N_K = self.logprob_N_K.clone()
        for row, allowed_V in enumerate(allowed):
            if allowed_V is not None:
                logprob_N_K[row, ~allowed_V[self.token_ids(row)]] = -math.inf
        return replace(self, logprob_N_K=logprob_N_K)

    def exceeds_others(self, row: int, score: float) -> bool:
        """True if a log-probability is at least that of each token that is neither a candidate nor the PLM's top-1.

        There the mixture is (1 − λ)·P_PLM. P_PLM is at most that of the top-1, and at most what the others leave of 1.
        """
        if score == -math.inf:
            return False
        weight, top1_logprob = 1.0 - float(self.lambda_N[row]), float(self.plm.top1_logprob_N[row])
        if weight <= 0.0 or score >= math.log(weight) + top1_logprob:
            return True
        others = float(self.plm.logprob_N_C[row].double().exp().sum())
        if self._index_of_top1()[row] == len(self.candidate_ids_C):
            others += math.exp(top1_logprob)
        rest = 1.0 - others * (1.0 - _ROUNDING)
        return rest <= 0.0 or score >= math.log(weight) + math.log(rest)

    def _index_of_top1(self) -> Tensor:
        """Column of `logprob_N_K` that has the PLM's top-1, int64 [N]."""
        index_N = index_of(self.plm.top1_N, self.candidate_ids_C)
        return torch.where(index_N >= 0, index_N, len(self.candidate_ids_C))

    def token_ids(self, row: int) -> Tensor:
        """Token ids [K] of one row of `logprob_N_K`."""
        return torch.cat([self.candidate_ids_C, self.plm.top1_N[row, None]])
