"""Positions at which tokens are selected, and the selected tokens with their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.interpolation import mix
from data_owner_client.decoding.sampling import Noise


@dataclass(frozen=True)
class DecodePosition:
    """A position at which a token is selected.

    Attributes:
        lambda_t: λ_t.
        t: index of the token in the continuation.
        noise: noise of the sequence; None to take the most probable token even when sampling.
        recent: ids of the continuation's last tokens before t, the newest last.
        context: when sampling or in a held answer, token ids of prompt and continuation before t.
        allowed_V: in a held answer, True for each token with which it can go on, bool [V]; None for all tokens.
        alternatives: number of alternatives to record on each side; 0 for none.
    """

    lambda_t: float
    t: int
    noise: Noise | None
    recent: Sequence[int] = ()
    context: Sequence[int] = ()
    allowed_V: Tensor | None = None
    alternatives: int = 0

    def allows(self, token: int) -> bool:
        """True if the token may be selected."""
        return self.allowed_V is None or bool(self.allowed_V[token])


@dataclass(frozen=True)
class Alternatives:
    """The most probable tokens at a position, each with its log-probability, the most probable first.

    Without the whole LM head they are those of the candidates and the PLM's top-1.

    Attributes:
        mixture: tokens of the mixture; only those that no other token of the vocabulary exceeds.
        plm: tokens of the PLM.
        pema: tokens of the adapter; empty where it was not used.
        unlisted: the PLM's probability of all tokens that were not compared.
    """

    mixture: list[tuple[int, float]]
    plm: list[tuple[int, float]]
    pema: list[tuple[int, float]]
    unlisted: float


@dataclass(frozen=True)
class TokenChoice:
    """The token selected at a position, with the scores behind it.

    Attributes:
        token: token id.
        lambda_t: λ_t.
        plm_logprob: log P_PLM of the token.
        pema_logprob: log P_PEMA of the token, −∞ where it is no candidate; None where the adapter was not used.
        plm_token: most probable token of the PLM alone.
        pema_token: most probable token of the adapter alone; None where the adapter was not used.
        alternatives: the most probable tokens at the position; None where they were not recorded.
    """

    token: int
    lambda_t: float
    plm_logprob: float
    pema_logprob: float | None
    plm_token: int
    pema_token: int | None
    alternatives: Alternatives | None = None

    @property
    def logprob(self) -> float:
        """log P of the token under the mixture."""
        if self.pema_logprob is None:
            return self.plm_logprob
        parts = torch.tensor([self.plm_logprob, self.pema_logprob, self.lambda_t], dtype=torch.float64)
        return float(mix(*parts))

    @property
    def share(self) -> float:
        """The adapter's share r = λ·P_PEMA / P of the token's probability, from 0 to 1."""
        if self.pema_logprob is None or self.lambda_t == 0.0:
            return 0.0
        return min(1.0, math.exp(math.log(self.lambda_t) + self.pema_logprob - self.logprob))


@dataclass(frozen=True)
class OpenChoice:
    """A choice between the best allowed token of those compared, and the tokens that are none of these.

    Attributes:
        resolve: returns the choice, which may need calls to the server.
    """

    resolve: Callable[[], TokenChoice]
