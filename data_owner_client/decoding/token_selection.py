"""Selection of the mixture's token at each position of a response: the most probable one, or a draw.

In a held answer it is the most probable of the allowed tokens. The candidates and the PLM's top-1 are compared at once.
Where one of them is allowed and more probable than any other token can be, it is the choice. Elsewhere the choice stays
open, and is resolved when the text reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.decoding.adapter_mixture import AdapterMixture, head_input, previous_tokens
from data_owner_client.decoding.candidate_mixture import CandidateMixture
from data_owner_client.decoding.choice_scores import (
    alternatives_of_vocabulary,
    choices_of,
    plm_choice,
    with_alternatives,
)
from data_owner_client.decoding.held.selection import HeldSelection
from data_owner_client.decoding.sampling import draw_token
from data_owner_client.decoding.settings import SamplingSettings
from data_owner_client.decoding.token_choice import DecodePosition, OpenChoice, TokenChoice
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
        self._mixture = None if adapter is None else AdapterMixture(adapter, interpolation, stop_ids)
        self._head = head
        self._sampling = sampling

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
        if self._mixture is None or (
            plm_alone and all(map(DecodePosition.allows, positions, response.top1_N.tolist()))
        ):
            return self._of_plm(response, positions)
        mixture, pema_logprob_N_C = self._mixture.at(response, positions, cr_N_D)
        mixture = mixture.held([position.allowed_V for position in positions])
        token_N = mixture.most_probable()
        if self._sampling is not None:
            _redraw(token_N, positions, mixture, self._sampling)
        choices = with_alternatives(
            choices_of(token_N, mixture, pema_logprob_N_C), mixture, pema_logprob_N_C, positions
        )
        return self._held.proven(choices, positions, head_input(response), response.logsumexp_N, mixture)

    def _of_plm(self, response: DecodeResponse, positions: Sequence[DecodePosition]) -> list[TokenChoice | OpenChoice]:
        """The PLM's choice at each position."""
        choices = [plm_choice(response, row, position) for row, position in enumerate(positions)]
        return self._held.proven(choices, positions, head_input(response), response.logsumexp_N, None)

    def _draw(
        self,
        sampling: SamplingSettings,
        head: LMHead,
        response: DecodeResponse,
        positions: Sequence[DecodePosition],
        cr_N_D: Tensor,
    ) -> list[TokenChoice]:
        input_N_D = head_input(response)
        choices: list[TokenChoice] = []
        for start in range(0, len(positions), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            plm_N_V = head.logits(input_N_D[rows].float()).double().log_softmax(dim=-1)
            pema_N_V, lambda_N, mixture_N_V = None, torch.zeros(len(plm_N_V)), plm_N_V
            if self._mixture is not None:
                adapter, recent = self._mixture.adapter, [p.recent for p in positions[rows]]
                pema_N_V = _over_vocabulary(adapter, cr_N_D[rows], previous_tokens(recent), plm_N_V)
                ids_C = adapter.candidate_ids_C
                lambda_N = self._mixture.lambdas(positions[rows], plm_N_V[:, ids_C], pema_N_V[:, ids_C])
                mixture_N_V = mix(plm_N_V, pema_N_V, lambda_N[:, None])
                if self._mixture.stop_penalty_C is not None:
                    mixture_N_V[:, ids_C] -= self._mixture.stop_penalty_C * (lambda_N > 0)[:, None]
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
                        alternatives_of_vocabulary(
                            mixture_N_V[row],
                            plm_N_V[row],
                            None if pema_N_V is None else pema_N_V[row],
                            position.alternatives,
                        ),
                    )
                )
        return choices


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


def _over_vocabulary(adapter: CandidateDistribution, cr_N_D: Tensor, previous_N_P: Tensor, like_N_V: Tensor) -> Tensor:
    """log P_PEMA over the whole vocabulary [N, V]: −∞ outside the candidates."""
    pema_logprob_N_V = torch.full_like(like_N_V, -math.inf)
    pema_logprob_N_V[:, adapter.candidate_ids_C] = adapter.logprobs(cr_N_D, previous_N_P).double()
    return pema_logprob_N_V
