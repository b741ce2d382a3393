"""Selection of the mixture's token at each position of a response: the most probable one, or a draw.

In a held answer it is the most probable of the allowed tokens. The candidates and the PLM's top-1 are compared at once.
Where one of them is allowed and more probable than any other token can be, it is the choice. Elsewhere the choice stays
open, and is resolved when the text reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.gate import gate_features
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.adapter.network import RECENT_TOKENS
from data_owner_client.decoding.candidate_mixture import CandidateMixture, PlmScores
from data_owner_client.decoding.held.selection import HeldSelection
from data_owner_client.decoding.sampling import draw_token
from data_owner_client.decoding.settings import SamplingSettings
from data_owner_client.decoding.token_choice import Alternatives, DecodePosition, OpenChoice, TokenChoice
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.quantization import dequantize

# Rows of the whole vocabulary at a time.
_ROWS_AT_ONCE = 8


class TokenSelector:
    """Selects tokens of the mixture.

    Args:
        adapter: adapter or baseline; None for the PLM alone.
        head: all rows of the LM head in float32, to sample from the whole vocabulary; else None.
        interpolation: source of the gate, which replaces the λ of the positions, and of the length reward.
        stop_ids: tokens that end a text. The length reward applies to those among the candidates: the candidates' rows
            alone cannot compare others with the whole vocabulary.
        sampling: settings of sampling, used at positions with noise; None to take the most probable tokens everywhere.
        held: proves the choices of held answers.
    """

    def __init__(
        self,
        adapter: CandidateDistribution | None,
        head: LMHead | None,
        interpolation: Interpolation,
        stop_ids: frozenset[int],
        sampling: SamplingSettings | None,
        held: HeldSelection,
    ) -> None:
        self._held = held
        self._adapter = adapter
        self._gate = interpolation.gate
        self._head = head
        self._sampling = sampling
        self._stop_penalty_C: Tensor | None = None
        if adapter is not None and interpolation.length_reward:
            is_stop_C = torch.isin(adapter.candidate_ids_C, torch.tensor(sorted(stop_ids), dtype=torch.int64))
            self._stop_penalty_C = interpolation.length_reward * is_stop_C.double()

    @property
    def unproven(self) -> int:
        """Choices in held answers that stand because the owner grants nothing that tells about other tokens."""
        return self._held.unproven

    def select(
        self, response: DecodeResponse, positions: Sequence[DecodePosition], adapter_response: DecodeResponse
    ) -> Sequence[TokenChoice | OpenChoice]:
        """The choice at each position.

        Args:
            response: the server's response behind the PLM's prompts.
            positions: one for each row of the response.
            adapter_response: the server's response for the same positions behind the adapter's prompts; `response`
                itself where the prompts are equal.
        """
        cr_N_D = dequantize(adapter_response.cr_N_D, adapter_response.cr_scale_N)
        if self._sampling is not None and self._head is not None:
            return self._draw(self._sampling, self._head, response, positions, cr_N_D)
        plm_alone = not any(position.lambda_t or position.noise or position.alternatives for position in positions)
        if self._adapter is None or (
            plm_alone and all(map(DecodePosition.allows, positions, response.top1_N.tolist()))
        ):
            return self._of_plm(response, positions)
        ids_C, plm = self._adapter.candidate_ids_C, plm_scores(self._adapter.head, response)
        pema_logprob_N_C = self._adapter.logprobs(cr_N_D, previous_tokens([p.recent for p in positions]))
        lambda_N = self._lambdas(positions, plm.logprob_N_C, pema_logprob_N_C)
        mixture = CandidateMixture.from_scores(plm, pema_logprob_N_C, ids_C, lambda_N, self._stop_penalty_C)
        mixture = mixture.held([position.allowed_V for position in positions])
        token_N = mixture.most_probable()
        if self._sampling is not None:
            _redraw(token_N, positions, mixture, self._sampling)
        # Every chosen token is a candidate, or else the PLM's top-1.
        index_N = index_of(token_N, ids_C)
        inside_N, index_N = index_N >= 0, index_N.clamp(min=0)
        top1_logprob_N = plm.top1_logprob_N
        chosen_plm_N = torch.where(
            token_N == plm.top1_N,
            top1_logprob_N,
            plm.logprob_N_C.gather(1, index_N[:, None])[:, 0].minimum(top1_logprob_N),
        )
        chosen_pema_N = pema_logprob_N_C.gather(1, index_N[:, None])[:, 0].masked_fill(~inside_N, -math.inf)
        columns = (token_N, lambda_N, chosen_plm_N, chosen_pema_N, plm.top1_N, ids_C[pema_logprob_N_C.argmax(dim=-1)])
        choices = [TokenChoice(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        choices = [
            replace(choice, alternatives=_alternatives(mixture, pema_logprob_N_C, row, position.alternatives))
            if position.alternatives
            else choice
            for row, (choice, position) in enumerate(zip(choices, positions, strict=True))
        ]
        return self._held.proven(choices, positions, _head_input(response), response.logsumexp_N, mixture)

    def _of_plm(self, response: DecodeResponse, positions: Sequence[DecodePosition]) -> list[TokenChoice | OpenChoice]:
        """The PLM's choice at each position."""
        choices = [
            TokenChoice(
                token, position.lambda_t, logprob, None, token, None, _of_top1(token, logprob, position.alternatives)
            )
            for token, logprob, position in zip(
                response.top1_N.tolist(), response.top1_logprob_N.tolist(), positions, strict=True
            )
        ]
        return self._held.proven(choices, positions, _head_input(response), response.logsumexp_N, None)

    def _lambdas(self, positions: Sequence[DecodePosition], plm_N_C: Tensor, pema_N_C: Tensor) -> Tensor:
        """λ at each position, float64."""
        if self._gate is None:
            return torch.tensor([position.lambda_t for position in positions], dtype=torch.float64)
        return self._gate.lambdas(gate_features(plm_N_C, pema_N_C, torch.tensor([p.t for p in positions])))

    def _draw(
        self,
        sampling: SamplingSettings,
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
                pema_N_V = _over_vocabulary(
                    self._adapter, cr_N_D[rows], previous_tokens([p.recent for p in positions[rows]]), plm_N_V
                )
            lambda_N, mixture_N_V = torch.zeros(len(plm_N_V)), plm_N_V
            if self._adapter is not None and pema_N_V is not None:
                ids_C = self._adapter.candidate_ids_C
                lambda_N = self._lambdas(positions[rows], plm_N_V[:, ids_C], pema_N_V[:, ids_C])
                mixture_N_V = mix(plm_N_V, pema_N_V, lambda_N[:, None])
                if self._stop_penalty_C is not None:
                    mixture_N_V[:, ids_C] -= self._stop_penalty_C * (lambda_N > 0)[:, None]
                    mixture_N_V = mixture_N_V.log_softmax(dim=-1)
            for row, position in enumerate(positions[rows]):
                logprob_V = _among_allowed(mixture_N_V[row], plm_N_V[row], position.allowed_V)
                token = int(logprob_V.argmax())
                if position.noise is not None:
                    token = draw_token(sampling, logprob_V, position.context, position.noise, position.t)
                choices.append(
                    TokenChoice(
                        token,
                        float(lambda_N[row]),
                        float(plm_N_V[row, token]),
                        None if pema_N_V is None else float(pema_N_V[row, token]),
                        int(plm_N_V[row].argmax()),
                        None if pema_N_V is None else int(pema_N_V[row].argmax()),
                        _of_vocabulary(
                            mixture_N_V[row],
                            plm_N_V[row],
                            None if pema_N_V is None else pema_N_V[row],
                            position.alternatives,
                        ),
                    )
                )
        return choices


def _alternatives(mixture: CandidateMixture, pema_logprob_N_C: Tensor, row: int, count: int) -> Alternatives:
    """The most probable candidates at one row, and the PLM's top-1."""
    ids_K, top1_logprob = mixture.token_ids(row), mixture.plm.top1_logprob_N[row, None]
    plm_K = torch.cat([mixture.plm.logprob_N_C[row].minimum(top1_logprob), top1_logprob])
    pema_K = torch.cat([pema_logprob_N_C[row], torch.tensor([-math.inf])])
    if mixture.logprob_N_K[row, -1] == -math.inf:  # the top-1 is among the candidates
        ids_K, plm_K, pema_K = ids_K[:-1], plm_K[:-1], pema_K[:-1]
    mixed = [
        (token, score)
        for token, score in _highest(ids_K, mixture.logprob_N_K[row, : len(ids_K)], count)
        if mixture.exceeds_others(row, score)
    ]
    unlisted = 1.0 - float(plm_K.double().exp().sum())
    return Alternatives(mixed, _highest(ids_K, plm_K, count), _highest(ids_K, pema_K, count), max(0.0, unlisted))


def _of_top1(token: int, logprob: float, count: int) -> Alternatives | None:
    """The PLM's top-1 alone, where alternatives are recorded."""
    top1 = [(token, logprob)]
    return Alternatives(top1, top1, [], max(0.0, 1.0 - math.exp(logprob))) if count else None


def _of_vocabulary(mixture_V: Tensor, plm_V: Tensor, pema_V: Tensor | None, count: int) -> Alternatives | None:
    """The most probable tokens of the whole vocabulary, where alternatives are recorded."""
    if not count:
        return None
    ids_V = torch.arange(len(plm_V))
    pema = [] if pema_V is None else _highest(ids_V, pema_V, count)
    return Alternatives(_highest(ids_V, mixture_V, count), _highest(ids_V, plm_V, count), pema, 0.0)


def _highest(ids_K: Tensor, logprob_K: Tensor, count: int) -> list[tuple[int, float]]:
    """The tokens of the highest log-probabilities, without those of probability 0."""
    top_K, index_K = logprob_K.topk(min(count, len(logprob_K)))
    pairs = zip(ids_K[index_K].tolist(), top_K.tolist(), strict=True)
    return [(token, logprob) for token, logprob in pairs if logprob > -math.inf]


def _redraw(
    token_N: Tensor, positions: Sequence[DecodePosition], mixture: CandidateMixture, sampling: SamplingSettings
) -> None:
    """Replace the token at each position with noise by a draw from the candidates and the PLM's top-1."""
    for row, position in enumerate(positions):
        if position.noise is not None and mixture.logprob_N_K[row].max() > -math.inf:
            logprob_K, ids_K = mixture.logprob_N_K[row].log_softmax(dim=-1), mixture.token_ids(row)
            drawn = draw_token(sampling, logprob_K, position.context, position.noise, position.t, ids_V=ids_K)
            token_N[row] = ids_K[drawn]


def _among_allowed(mixture_V: Tensor, plm_V: Tensor, allowed_V: Tensor | None) -> Tensor:
    """The mixture over the allowed tokens; the PLM's distribution where the mixture has none of them."""
    if allowed_V is None:
        return mixture_V
    held_V = mixture_V.masked_fill(~allowed_V, -math.inf)
    return held_V if held_V.max() > -math.inf else plm_V.masked_fill(~allowed_V, -math.inf)


def previous_tokens(continuations: Sequence[Sequence[int]]) -> Tensor:
    """Token ids [N, P] of the last tokens of each continuation, the newest first; −1 for none."""
    recent = [[*reversed(ids[-RECENT_TOKENS:])] for ids in continuations]
    return torch.tensor([ids + [-1] * (RECENT_TOKENS - len(ids)) for ids in recent], dtype=torch.int64).view(
        -1, RECENT_TOKENS
    )


def _over_vocabulary(adapter: CandidateDistribution, cr_N_D: Tensor, previous_N_P: Tensor, like_N_V: Tensor) -> Tensor:
    """log P_PEMA over the whole vocabulary [N, V]: −∞ outside the candidates."""
    pema_logprob_N_V = torch.full_like(like_N_V, -math.inf)
    pema_logprob_N_V[:, adapter.candidate_ids_C] = adapter.logprobs(cr_N_D, previous_N_P).double()
    return pema_logprob_N_V


def plm_scores(head: LMHead, response: DecodeResponse) -> PlmScores:
    """The PLM's log-probabilities of the candidates, from their head rows and the log-sum-exp over V."""
    logprob_N_C = head.logits(_head_input(response).float()) - response.logsumexp_N[:, None]
    return PlmScores(logprob_N_C, response.top1_N, response.top1_logprob_N)


def _head_input(response: DecodeResponse) -> Tensor:
    if response.last_hidden_N_D is None:
        return dequantize(response.cr_N_D, response.cr_scale_N)
    return dequantize(response.last_hidden_N_D, response.last_hidden_scale_N)
