"""The mixture's choice at every position of an answer: the most probable token, or a drawn one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter import TrainedAdapter
from data_owner_client.decoding.interpolation import PlmPositions, choose, mix
from data_owner_client.decoding.sampling import Noise, Sampling
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.rows import expand

# Rows of all of V at a time.
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Position:
    """Where a choice is made.

    Attributes:
        weight: λ_t.
        t: of the token, among those of the continuation.
        noise: of its sequence; None to take the most probable token.
        context: when sampling, token ids of prompt and continuation before it.
    """

    weight: float
    t: int
    noise: Noise | None
    context: Sequence[int]


class Chooser:
    """Chooses tokens of the mixture.

    Args:
        adapter: None for the PLM alone.
        head: all rows of the LM head in float32; only needed to sample.
        sampling: None to take the most probable tokens, which needs no more than the candidates' rows.
    """

    def __init__(self, adapter: TrainedAdapter | None, head: LMHead | None, sampling: Sampling | None) -> None:
        self._adapter = adapter
        self._head = head
        self._sampling = sampling

    def choose(self, response: DecodeResponse, positions: Sequence[Position]) -> tuple[list[int], list[float]]:
        """The choice at each position, and when sampling its log-probability under the mixture (else 0)."""
        if self._sampling is not None and self._head is not None:
            return self._draw(self._sampling, self._head, response, positions)
        if self._adapter is None or not any(position.weight for position in positions):
            return response.top1_N.tolist(), [0.0] * len(positions)
        adapter, plm = self._adapter, plm_positions(self._adapter.head, response)
        pema_logprob_N_C = adapter.logprobs(expand(response.cr_N_D, response.cr_scale_N))
        lambda_N = _weights(positions)
        return choose(plm, pema_logprob_N_C, adapter.candidate_ids_C, lambda_N).tolist(), [0.0] * len(positions)

    def _draw(
        self, sampling: Sampling, head: LMHead, response: DecodeResponse, positions: Sequence[Position]
    ) -> tuple[list[int], list[float]]:
        cr_N_D, input_N_D = expand(response.cr_N_D, response.cr_scale_N), _head_input(response)
        tokens, logprobs = list[int](), list[float]()
        for start in range(0, len(positions), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            mixture_N_V = head.logits(input_N_D[rows].float()).double().log_softmax(dim=-1)
            if self._adapter is not None:
                mixture_N_V = self._mixture(self._adapter, mixture_N_V, cr_N_D[rows], _weights(positions[rows]))
            for logprob_V, position in zip(mixture_N_V, positions[rows], strict=True):
                if position.noise is None:
                    raise ValueError("a sampled sequence needs its noise")
                token = sampling.draw(logprob_V, position.context, position.noise, position.t)
                tokens.append(token)
                logprobs.append(float(logprob_V[token]))
        return tokens, logprobs

    @staticmethod
    def _mixture(adapter: TrainedAdapter, plm_logprob_N_V: Tensor, cr_N_D: Tensor, lambda_N: Tensor) -> Tensor:
        pema_logprob_N_V = torch.full_like(plm_logprob_N_V, -math.inf)
        pema_logprob_N_V[:, adapter.candidate_ids_C] = adapter.logprobs(cr_N_D).double()
        return mix(plm_logprob_N_V, pema_logprob_N_V, lambda_N[:, None])


def plm_positions(head: LMHead, response: DecodeResponse) -> PlmPositions:
    """The PLM's log-probabilities of the candidates from their head rows and the log-sum-exp over V."""
    logprob_N_C = head.logits(_head_input(response).float()) - response.logsumexp_N[:, None]
    return PlmPositions(logprob_N_C, response.top1_N, response.top1_logprob_N)


def _head_input(response: DecodeResponse) -> Tensor:
    if response.last_hidden_N_D is None:
        return expand(response.cr_N_D, response.cr_scale_N)
    return expand(response.last_hidden_N_D, response.last_hidden_scale_N)


def _weights(positions: Sequence[Position]) -> Tensor:
    return torch.tensor([position.weight for position in positions], dtype=torch.float64)
