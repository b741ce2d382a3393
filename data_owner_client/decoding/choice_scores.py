"""Selected tokens with the scores behind them, and the alternatives at their positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_owner_client.adapter.candidates import index_of
from data_owner_client.decoding.candidate_mixture import CandidateMixture
from data_owner_client.decoding.token_choice import Alternatives, DecodePosition, TokenChoice
from protocol.messages import DecodeResponse


def choices_of(
    token_N: Tensor, mixture: CandidateMixture, pema_logprob_N_C: Tensor, plm_logprob_N: Tensor | None = None
) -> list[TokenChoice]:
    """A token at each position with its scores.

    Args:
        token_N: int64, the tokens.
        mixture: the mixture at the positions.
        pema_logprob_N_C: log P_PEMA of the candidates.
        plm_logprob_N: log P_PLM of the tokens; None where each is a candidate, or else the PLM's top-1.
    """
    plm_logprob_N_1 = None if plm_logprob_N is None else plm_logprob_N[:, None]
    return [choice for (choice,) in choices_at(token_N[:, None], mixture, pema_logprob_N_C, plm_logprob_N_1)]


def choices_at(
    token_N_M: Tensor, mixture: CandidateMixture, pema_logprob_N_C: Tensor, plm_logprob_N_M: Tensor | None = None
) -> list[list[TokenChoice]]:
    """M tokens at each position with their scores; the arguments are as of `choices_of`."""
    ids_C, plm, shape_N_M = mixture.candidate_ids_C, mixture.plm, token_N_M.shape
    index_N_M = index_of(token_N_M, ids_C)
    inside_N_M, index_N_M = index_N_M >= 0, index_N_M.clamp(min=0)
    if plm_logprob_N_M is None:
        top1_logprob_N_1 = plm.top1_logprob_N[:, None]
        plm_logprob_N_M = torch.where(
            token_N_M == plm.top1_N[:, None],
            top1_logprob_N_1,
            plm.logprob_N_C.gather(1, index_N_M).minimum(top1_logprob_N_1),
        )
    pema_logprob_N_M = pema_logprob_N_C.gather(1, index_N_M).masked_fill(~inside_N_M, -math.inf)
    pema_token_N = ids_C[pema_logprob_N_C.argmax(dim=-1)]
    lambda_N_M, plm_token_N_M, pema_token_N_M = (
        each_N[:, None].expand(shape_N_M) for each_N in (mixture.lambda_N, plm.top1_N, pema_token_N)
    )
    columns = (token_N_M, lambda_N_M, plm_logprob_N_M, pema_logprob_N_M, plm_token_N_M, pema_token_N_M)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [[TokenChoice(*scores) for scores in zip(*row, strict=True)] for row in rows]


def plm_choice(response: DecodeResponse, row: int, position: DecodePosition) -> TokenChoice:
    """The PLM's choice at a position."""
    token, logprob = int(response.top1_N[row]), float(response.top1_logprob_N[row])
    alternatives = _of_top1(token, logprob, position.alternatives)
    return TokenChoice(token, position.lambda_t, logprob, None, token, None, alternatives)


def with_alternatives(
    choices: Sequence[TokenChoice],
    mixture: CandidateMixture,
    pema_logprob_N_C: Tensor,
    positions: Sequence[DecodePosition],
) -> list[TokenChoice]:
    """The choices, with alternatives where the positions want them."""
    return [
        replace(choice, alternatives=alternatives_at(mixture, pema_logprob_N_C, row, position.alternatives))
        if position.alternatives
        else choice
        for row, (choice, position) in enumerate(zip(choices, positions, strict=True))
    ]


def alternatives_at(mixture: CandidateMixture, pema_logprob_N_C: Tensor, row: int, count: int) -> Alternatives:
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


def choices_of_vocabulary(
    tokens: Sequence[int], lambda_t: float, mixture_V: Tensor, plm_V: Tensor, pema_V: Tensor | None, count: int
) -> list[TokenChoice]:
    """Tokens at one position with their scores.

    Args:
        tokens: the tokens.
        lambda_t: λ_t.
        mixture_V: log P of the mixture.
        plm_V: log P_PLM.
        pema_V: log P_PEMA, −∞ outside the candidates; None without an adapter.
        count: number of alternatives; 0 for none.
    """
    plm_token, pema_token = int(plm_V.argmax()), None if pema_V is None else int(pema_V.argmax())
    alternatives = None
    if count:
        ids_V = torch.arange(len(plm_V))
        pema = [] if pema_V is None else _highest(ids_V, pema_V, count)
        alternatives = Alternatives(_highest(ids_V, mixture_V, count), _highest(ids_V, plm_V, count), pema, 0.0)
    return [
        TokenChoice(
            token,
            lambda_t,
            float(plm_V[token]),
            None if pema_V is None else float(pema_V[token]),
            plm_token,
            pema_token,
            alternatives,
        )
        for token in tokens
    ]


def _highest(ids_K: Tensor, logprob_K: Tensor, count: int) -> list[tuple[int, float]]:
    """The tokens of the highest log-probabilities, without those of probability 0."""
    top_K, index_K = logprob_K.topk(min(count, len(logprob_K)))
    pairs = zip(ids_K[index_K].tolist(), top_K.tolist(), strict=True)
    return [(token, logprob) for token, logprob in pairs if logprob > -math.inf]
