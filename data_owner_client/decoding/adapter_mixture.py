"""The mixture of PLM and adapter at the positions of a response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.gate import gate_features
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.decoding.candidate_mixture import CandidateMixture, PlmScores
from data_owner_client.decoding.token_choice import DecodePosition
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.quantization import dequantize


class AdapterMixture:
    """Mixes an adapter with the PLM.

    Args:
        adapter: adapter or baseline.
        interpolation: source of the gate, which replaces the λ of the positions, and of the length reward.
        stop_ids: tokens that end a text. The length reward applies to those among the candidates: the candidates' rows
            alone cannot compare others with the whole vocabulary.

    Attributes:
        adapter: adapter or baseline.
        stop_penalty_C: nats taken from the log-probability of each candidate, where λ > 0; None for none.
    """

    def __init__(self, adapter: CandidateDistribution, interpolation: Interpolation, stop_ids: frozenset[int]) -> None:
        self.adapter = adapter
        self._gate = interpolation.gate
        self.stop_penalty_C: Tensor | None = None
        if interpolation.length_reward:
            is_stop_C = torch.isin(adapter.candidate_ids_C, torch.tensor(sorted(stop_ids), dtype=torch.int64))
            self.stop_penalty_C = interpolation.length_reward * is_stop_C.double()

    def at(
        self, response: DecodeResponse, positions: Sequence[DecodePosition], cr_N_D: Tensor
    ) -> tuple[CandidateMixture, Tensor]:
        """The mixture at each position, and log P_PEMA of the candidates [N, C], float32.

        Args:
            response: the server's response behind the PLM's prompts.
            positions: one for each row of the response.
            cr_N_D: representations of these positions behind the adapter's prompts.
        """
        adapter = self.adapter
        plm = plm_scores(adapter.head, response)
        pema_logprob_N_C = adapter.logprobs(cr_N_D, previous_tokens([p.recent for p in positions]))
        lambda_N = self.lambdas(positions, plm.logprob_N_C, pema_logprob_N_C)
        mixture = CandidateMixture.from_scores(
            plm, pema_logprob_N_C, adapter.candidate_ids_C, lambda_N, self.stop_penalty_C
        )
        return mixture, pema_logprob_N_C

    def lambdas(self, positions: Sequence[DecodePosition], plm_N_C: Tensor, pema_N_C: Tensor) -> Tensor:
        """λ at each position, float64.

        Args:
            positions: the positions.
            plm_N_C: log P_PLM of the candidates.
            pema_N_C: log P_PEMA of the candidates.
        """
        if self._gate is None:
            return torch.tensor([position.lambda_t for position in positions], dtype=torch.float64)
        return self._gate.lambdas(gate_features(plm_N_C, pema_N_C, torch.tensor([p.t for p in positions])))


def previous_tokens(continuations: Sequence[Sequence[int]]) -> Tensor:
    """Token ids [N, P] of the last tokens of each continuation, the newest first; −1 for none."""
    recent = [[*reversed(ids[-RECENT_TOKENS:])] for ids in continuations]
    return torch.tensor([ids + [-1] * (RECENT_TOKENS - len(ids)) for ids in recent], dtype=torch.int64).view(
        -1, RECENT_TOKENS
    )


def plm_scores(head: LMHead, response: DecodeResponse) -> PlmScores:
    """The PLM's log-probabilities of the candidates, from their head rows and the log-sum-exp over V."""
    logprob_N_C = head.logits(head_input(response).float()) - response.logsumexp_N[:, None]
    return PlmScores(logprob_N_C, response.top1_N, response.top1_logprob_N)


def head_input(response: DecodeResponse) -> Tensor:
    """Inputs of the LM head [N, D]."""
    if response.last_hidden_N_D is None:
        return dequantize(response.cr_N_D, response.cr_scale_N)
    return dequantize(response.last_hidden_N_D, response.last_hidden_scale_N)
