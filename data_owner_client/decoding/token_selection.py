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
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.adapter_mixture import AdapterMixture, head_input
from data_owner_client.decoding.beams.extensions import Extension, candidate_extensions, vocabulary_extensions
from data_owner_client.decoding.candidate_mixture import CandidateMixture
from data_owner_client.decoding.choice_scores import choices_of, plm_choice, with_alternatives
from data_owner_client.decoding.held.selection import HeldSelection
from data_owner_client.decoding.sampling import draw_token
from data_owner_client.decoding.settings import SamplingSettings
from data_owner_client.decoding.token_choice import DecodePosition, OpenChoice, TokenChoice
from data_owner_client.decoding.vocabulary_mixture import vocabulary_mixtures
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.quantization import dequantize


class TokenSelector:
    """Selects tokens of the mixture.

    Args:
        adapter: adapter or baseline; None for the PLM alone.
        head: all rows of the LM head in float32, for draws and beams from the whole vocabulary; else None.
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
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64)
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

    def extensions(
        self,
        response: DecodeResponse,
        positions: Sequence[DecodePosition],
        adapter_response: DecodeResponse,
        beams: int,
    ) -> list[list[Extension]]:
        """The most probable tokens at each position, enough of them for that many beams.

        They are tokens of the whole vocabulary where there are all rows of the LM head, else candidates and the PLM's
        top-1. Tokens that are neither are less probable to the PLM than its top-1, and have no probability of the
        adapter. No beam goes through them, as no draw does with `SamplingSettings.candidates_only`.

        Args:
            response: the server's response behind the PLM's prompts.
            positions: one for each row of the response.
            adapter_response: the response behind the adapter's prompts; `response` where the prompts are equal.
            beams: number of beams.
        """
        cr_N_D = dequantize(adapter_response.cr_N_D, adapter_response.cr_scale_N)
        if self._head is not None:
            parts = vocabulary_mixtures(self._mixture, self._head, response, positions, cr_N_D)
            return [row for part in parts for row in vocabulary_extensions(part, self._stop_ids, beams)]
        if self._mixture is None:
            raise ValueError("without an adapter, beams need the whole LM head")
        mixture, pema_logprob_N_C = self._mixture.at(response, positions, cr_N_D)
        return candidate_extensions(mixture, pema_logprob_N_C, positions, self._stop_ids, beams)

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
        choices: list[TokenChoice] = []
        for part in vocabulary_mixtures(self._mixture, head, response, positions, cr_N_D):
            mixture_N_V = part.logprob_N_V
            if self._mixture is not None and self._mixture.stop_penalty_C is not None:
                mixture_N_V = mixture_N_V.log_softmax(dim=-1)
            for row, position in enumerate(part.positions):
                logprob_V = _among_allowed(mixture_N_V[row], part.plm_N_V[row], position.allowed_V)
                token = int(logprob_V.argmax())
                if position.noise is not None:
                    token = draw_token(sampling, logprob_V, position.context, position.noise, position.t)
                choices += part.choices(row, [token], mixture_N_V[row])
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
