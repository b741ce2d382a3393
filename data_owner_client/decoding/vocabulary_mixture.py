"""The mixture over the whole vocabulary, a few positions at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import mix
from data_owner_client.decoding.adapter_mixture import AdapterMixture, head_input, previous_tokens
from data_owner_client.decoding.choice_scores import choices_of_vocabulary
from data_owner_client.decoding.token_choice import DecodePosition, TokenChoice
from protocol.head import LMHead
from protocol.messages import DecodeResponse

# Rows of the whole vocabulary at a time.
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class VocabularyMixture:
    """PLM, adapter and mixture at N positions, over all of V.

    Attributes:
        positions: the positions.
        plm_N_V: log P_PLM, float64.
        pema_N_V: log P_PEMA, float64, −∞ outside the candidates; None without an adapter.
        lambda_N: λ at each position.
        logprob_N_V: log P of the mixture less the stop penalty, float64.
    """

    positions: Sequence[DecodePosition]
    plm_N_V: Tensor
    pema_N_V: Tensor | None
    lambda_N: Tensor
    logprob_N_V: Tensor

    def choices(self, row: int, tokens: Sequence[int], logprob_V: Tensor) -> list[TokenChoice]:
        """Tokens at one position with their scores.

        Args:
            row: index of the position.
            tokens: the tokens.
            logprob_V: log P of the mixture, for the alternatives.
        """
        return choices_of_vocabulary(
            tokens,
            float(self.lambda_N[row]),
            logprob_V,
            self.plm_N_V[row],
            None if self.pema_N_V is None else self.pema_N_V[row],
            self.positions[row].alternatives,
        )


def vocabulary_mixtures(
    mixture: AdapterMixture | None,
    head: LMHead,
    response: DecodeResponse,
    positions: Sequence[DecodePosition],
    cr_N_D: Tensor,
) -> Iterator[VocabularyMixture]:
    """The mixture at all positions, in slices of a few, because a large vocabulary has megabytes in each.

    Args:
        mixture: the adapter, mixed with the PLM; None for the PLM alone.
        head: all rows of the LM head in float32.
        response: the server's response behind the PLM's prompts.
        positions: one for each row of the response.
        cr_N_D: representations of these positions behind the adapter's prompts.
    """
    input_N_D = head_input(response)
    for start in range(0, len(positions), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        plm_N_V = head.logits(input_N_D[rows].float()).double().log_softmax(dim=-1)
        if mixture is None:
            yield VocabularyMixture(positions[rows], plm_N_V, None, torch.zeros(len(plm_N_V)), plm_N_V)
            continue
        recent = [position.recent for position in positions[rows]]
        pema_N_V = _over_vocabulary(mixture.adapter, cr_N_D[rows], previous_tokens(recent), plm_N_V)
        ids_C = mixture.adapter.candidate_ids_C
        lambda_N = mixture.lambdas(positions[rows], plm_N_V[:, ids_C], pema_N_V[:, ids_C])
        logprob_N_V = mix(plm_N_V, pema_N_V, lambda_N[:, None])
        if mixture.stop_penalty_C is not None:
            logprob_N_V[:, ids_C] -= mixture.stop_penalty_C * (lambda_N > 0)[:, None]
        yield VocabularyMixture(positions[rows], plm_N_V, pema_N_V, lambda_N, logprob_N_V)


def _over_vocabulary(adapter: CandidateDistribution, cr_N_D: Tensor, previous_N_P: Tensor, like_N_V: Tensor) -> Tensor:
    """log P_PEMA over the whole vocabulary [N, V]: −∞ outside the candidates."""
    pema_logprob_N_V = torch.full_like(like_N_V, -math.inf)
    pema_logprob_N_V[:, adapter.candidate_ids_C] = adapter.logprobs(cr_N_D, previous_N_P).double()
    return pema_logprob_N_V
