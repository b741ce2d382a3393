"""The mixture's choice at every position of an answer: the most probable token, or a drawn one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.gate import gate_features
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.decoding.candidate_mixture import CandidateMixture, PlmScores
from data_owner_client.decoding.sampling import Noise, Sampling
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.quantization import dequantize

# Rows of all of V at a time.
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class DecodePosition:
    """Where a choice is made.

    Attributes:
        weight: λ_t.
        t: of the token, among those of the continuation.
        noise: of its sequence; None to take the most probable token, also where others draw.
        recent: the newest tokens of the continuation before it, in their order.
        context: when sampling, token ids of prompt and continuation before it.
    """

    weight: float
    t: int
    noise: Noise | None
    recent: Sequence[int] = ()
    context: Sequence[int] = ()


@dataclass(frozen=True)
class TokenChoice:
    """The token chosen at a position, and why.

    Attributes:
        token: its id.
        weight: λ_t.
        plm_logprob: log P_PLM of it.
        pema_logprob: log P_PEMA of it, −∞ where it is no candidate; None where the adapter was not asked.
        plm_token: what the PLM alone holds most probable.
        pema_token: what the adapter alone does; None where it was not asked.
    """

    token: int
    weight: float
    plm_logprob: float
    pema_logprob: float | None
    plm_token: int
    pema_token: int | None

    @property
    def logprob(self) -> float:
        """log P of the token, the mixture's."""
        if self.pema_logprob is None:
            return self.plm_logprob
        parts = torch.tensor([self.plm_logprob, self.pema_logprob, self.weight], dtype=torch.float64)
        return float(mix(*parts))


class TokenSelector:
    """Chooses tokens of the mixture.

    Args:
        adapter: None for the PLM alone.
        head: all rows of the LM head in float32; only needed to sample from all of V.
        interpolation: its gate gives λ in the place of the positions' own; its length reward is for all positions.
        stop_ids: tokens that end a text. The length reward is taken from those among the candidates: others cannot be
            weighed against all of V by the candidates' rows alone.
        sampling: None to take the most probable tokens at all positions, else at those without noise.
    """

    def __init__(
        self,
        adapter: CandidateDistribution | None,
        head: LMHead | None,
        interpolation: Interpolation,
        stop_ids: frozenset[int],
        sampling: Sampling | None,
    ) -> None:
        self._adapter = adapter
        self._gate = interpolation.gate
        self._head = head
        self._sampling = sampling
        self._reluctance_C: Tensor | None = None
        if adapter is not None and interpolation.length_reward:
            is_stop_C = torch.isin(adapter.candidate_ids_C, torch.tensor(sorted(stop_ids), dtype=torch.int64))
            self._reluctance_C = interpolation.length_reward * is_stop_C.double()

    def choose(
        self, response: DecodeResponse, positions: Sequence[DecodePosition], own: DecodeResponse
    ) -> list[TokenChoice]:
        """The choice at each position.

        Args:
            response: what the PLM makes of the positions.
            positions: in the order of its rows.
            own: the same positions behind the prompts that the adapter knows; the same answer where they are the same.
        """
        cr_N_D = dequantize(own.cr_N_D, own.cr_scale_N)
        if self._sampling is not None and self._head is not None:
            return self._draw(self._sampling, self._head, response, positions, cr_N_D)
        if self._adapter is None or not any(position.weight or position.noise for position in positions):
            return [
                TokenChoice(token, position.weight, logprob, None, token, None)
                for token, logprob, position in zip(
                    response.top1_N.tolist(), response.top1_logprob_N.tolist(), positions, strict=True
                )
            ]
        ids_C, plm = self._adapter.candidate_ids_C, plm_positions(self._adapter.head, response)
        pema_logprob_N_C = self._adapter.logprobs(cr_N_D, _previous(positions))
        lambda_N = self._lambdas(positions, plm.logprob_N_C, pema_logprob_N_C)
        known = CandidateMixture.of(plm, pema_logprob_N_C, ids_C, lambda_N, self._reluctance_C)
        token_N = known.most_probable()
        if self._sampling is not None:
            _redraw(token_N, positions, known, self._sampling)
        # Every chosen token is a candidate, or else the PLM's top-1.
        at_N = index_of(token_N, ids_C)
        inside_N, at_N = at_N >= 0, at_N.clamp(min=0)
        top1_logprob_N = plm.top1_logprob_N
        own_plm_N = torch.where(
            token_N == plm.top1_N,
            top1_logprob_N,
            plm.logprob_N_C.gather(1, at_N[:, None])[:, 0].minimum(top1_logprob_N),
        )
        own_pema_N = pema_logprob_N_C.gather(1, at_N[:, None])[:, 0].masked_fill(~inside_N, -math.inf)
        columns = (token_N, lambda_N, own_plm_N, own_pema_N, plm.top1_N, ids_C[pema_logprob_N_C.argmax(dim=-1)])
        return [TokenChoice(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def _lambdas(self, positions: Sequence[DecodePosition], plm_N_C: Tensor, pema_N_C: Tensor) -> Tensor:
        """λ at each position, float64."""
        if self._gate is None:
            return torch.tensor([position.weight for position in positions], dtype=torch.float64)
        return self._gate.lambdas(gate_features(plm_N_C, pema_N_C, torch.tensor([p.t for p in positions])))

    def _draw(
        self,
        sampling: Sampling,
        head: LMHead,
        response: DecodeResponse,
        positions: Sequence[DecodePosition],
        cr_N_D: Tensor,
    ) -> list[TokenChoice]:
        input_N_D = _head_input(response)
        choices: list[TokenChoice] = []
        for start in range(0, len(positions), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            plm_N_V = head.logits(input_N_D[rows].float()).double().log_softmax(dim=-1)
            pema_N_V = None
            if self._adapter is not None:
                pema_N_V = _over_all(self._adapter, cr_N_D[rows], _previous(positions[rows]), plm_N_V)
            lambda_N, mixture_N_V = torch.zeros(len(plm_N_V)), plm_N_V
            if self._adapter is not None and pema_N_V is not None:
                ids_C = self._adapter.candidate_ids_C
                lambda_N = self._lambdas(positions[rows], plm_N_V[:, ids_C], pema_N_V[:, ids_C])
                mixture_N_V = mix(plm_N_V, pema_N_V, lambda_N[:, None])
                if self._reluctance_C is not None:
                    mixture_N_V[:, ids_C] -= self._reluctance_C * (lambda_N > 0)[:, None]
                    mixture_N_V = mixture_N_V.log_softmax(dim=-1)
            for row, position in enumerate(positions[rows]):
                token = int(mixture_N_V[row].argmax())
                if position.noise is not None:
                    token = sampling.draw(mixture_N_V[row], position.context, position.noise, position.t)
                choices.append(
                    TokenChoice(
                        token,
                        float(lambda_N[row]),
                        float(plm_N_V[row, token]),
                        None if pema_N_V is None else float(pema_N_V[row, token]),
                        int(plm_N_V[row].argmax()),
                        None if pema_N_V is None else int(pema_N_V[row].argmax()),
                    )
                )
        return choices


def _redraw(token_N: Tensor, positions: Sequence[DecodePosition], known: CandidateMixture, sampling: Sampling) -> None:
    """Wherever there is noise, put a draw from the known tokens in the place of the most probable one."""
    for row, position in enumerate(positions):
        if position.noise is not None:
            logprob_K, ids_K = known.logprob_N_K[row].log_softmax(dim=-1), known.ids_K(row)
            drawn = sampling.draw(logprob_K, position.context, position.noise, position.t, ids_V=ids_K)
            token_N[row] = ids_K[drawn]


def _previous(positions: Sequence[DecodePosition]) -> Tensor:
    """Token ids of the last tokens before each position, the newest first; −1 for none."""
    recent = [list(reversed(position.recent[-RECENT_TOKENS:])) for position in positions]
    return torch.tensor([own + [-1] * (RECENT_TOKENS - len(own)) for own in recent], dtype=torch.int64).view(
        -1, RECENT_TOKENS
    )


def _over_all(adapter: CandidateDistribution, cr_N_D: Tensor, previous_N_K: Tensor, like_N_V: Tensor) -> Tensor:
    """log P_PEMA over all of V: −∞ but for the candidates."""
    pema_logprob_N_V = torch.full_like(like_N_V, -math.inf)
    pema_logprob_N_V[:, adapter.candidate_ids_C] = adapter.logprobs(cr_N_D, previous_N_K).double()
    return pema_logprob_N_V


def plm_positions(head: LMHead, response: DecodeResponse) -> PlmScores:
    """The PLM's log-probabilities of the candidates from their head rows and the log-sum-exp over V."""
    logprob_N_C = head.logits(_head_input(response).float()) - response.logsumexp_N[:, None]
    return PlmScores(logprob_N_C, response.top1_N, response.top1_logprob_N)


def _head_input(response: DecodeResponse) -> Tensor:
    if response.last_hidden_N_D is None:
        return dequantize(response.cr_N_D, response.cr_scale_N)
    return dequantize(response.last_hidden_N_D, response.last_hidden_scale_N)
