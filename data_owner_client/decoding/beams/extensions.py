"""Tokens by which a beam may grow, with their log-probabilities in the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_owner_client.decoding.candidate_mixture import CandidateMixture
from data_owner_client.decoding.choice_scores import alternatives_at, choices_at
from data_owner_client.decoding.token_choice import DecodePosition, TokenChoice
from data_owner_client.decoding.vocabulary_mixture import VocabularyMixture


@dataclass(frozen=True)
class Extension:
    """A token by which a beam may grow.

    Attributes:
        choice: the token with its scores.
        logprob: log P of the token under the mixture, less its stop penalty.
    """

    choice: TokenChoice
    logprob: float


def candidate_extensions(
    mixture: CandidateMixture,
    pema_logprob_N_C: Tensor,
    positions: Sequence[DecodePosition],
    stop_ids: Tensor,
    beams: int,
) -> list[list[Extension]]:
    """The extensions at each position, among the candidates and the PLM's top-1.

    Args:
        mixture: the mixture at the positions.
        pema_logprob_N_C: log P_PEMA of the candidates.
        positions: the positions.
        stop_ids: int64, the tokens that end a text.
        beams: number of beams.
    """
    ids_C, top1_N_1 = mixture.candidate_ids_C, mixture.plm.top1_N[:, None]
    is_stop_N_C = torch.isin(ids_C, stop_ids).expand(len(top1_N_1), -1)
    is_stop_N_K = torch.cat([is_stop_N_C, torch.isin(top1_N_1, stop_ids)], dim=1)
    logprob_N_M, index_N_M = _most_probable(mixture.logprob_N_K, is_stop_N_K, beams)
    token_N_M = torch.where(index_N_M == len(ids_C), top1_N_1, ids_C[index_N_M.clamp(max=len(ids_C) - 1)])
    choices_N = choices_at(token_N_M, mixture, pema_logprob_N_C)
    for row, position in enumerate(positions):
        if position.alternatives:
            alternatives = alternatives_at(mixture, pema_logprob_N_C, row, position.alternatives)
            choices_N[row] = [replace(choice, alternatives=alternatives) for choice in choices_N[row]]
    return [_possible(*row) for row in zip(choices_N, logprob_N_M.tolist(), strict=True)]


def vocabulary_extensions(mixture: VocabularyMixture, stop_ids: Tensor, beams: int) -> list[list[Extension]]:
    """The extensions at each position, among all tokens; the arguments are as of `candidate_extensions`."""
    is_stop_V = torch.zeros(mixture.logprob_N_V.shape[1], dtype=torch.bool)
    is_stop_V[stop_ids] = True
    logprob_N_M, token_N_M = _most_probable(mixture.logprob_N_V, is_stop_V, beams)
    return [
        _possible(mixture.choices(row, token_M, mixture.logprob_N_V[row]), logprob_M)
        for row, (token_M, logprob_M) in enumerate(zip(token_N_M.tolist(), logprob_N_M.tolist(), strict=True))
    ]


def _most_probable(logprob_N_K: Tensor, is_stop_K: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and columns [N, M] of enough tokens of each row: as many stops as beams, twice the others.

    So the most probable extensions of all rows, one for each beam, are among them, as are others in their place where
    they end their texts.
    """
    tokens = logprob_N_K.shape[1]
    stops = logprob_N_K.masked_fill(~is_stop_K, -math.inf).topk(min(beams, tokens))
    others = logprob_N_K.masked_fill(is_stop_K, -math.inf).topk(min(2 * beams, tokens))
    return torch.cat([stops.values, others.values], dim=1), torch.cat([stops.indices, others.indices], dim=1)


def _possible(choices: Sequence[TokenChoice], logprobs: Sequence[float]) -> list[Extension]:
    """The tokens that have a probability."""
    pairs = zip(choices, logprobs, strict=True)
    return [Extension(choice, logprob) for choice, logprob in pairs if logprob > -math.inf]
