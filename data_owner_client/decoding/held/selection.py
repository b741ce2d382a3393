"""Proof that the choice in a held answer is the most probable allowed token of the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from data_owner_client.decoding.candidate_mixture import CandidateMixture
from data_owner_client.decoding.held.token_search import TokenSearch
from data_owner_client.decoding.token_choice import DecodePosition, OpenChoice, TokenChoice
from protocol.errors import Unsupported


@dataclass(frozen=True)
class _Compared:
    """The best of the tokens that were compared at one position.

    Attributes:
        choice: the token; of no meaning where the score is −∞.
        score: its log-probability in the mixture, less its stop penalty; −∞ where none is allowed.
        position: position in a held answer.
        h_D: input of the LM head.
        logsumexp: log-sum-exp of all logits of the PLM.
        candidate_ids_C: int64, the tokens compared beside the PLM's top-1; None for none.
    """

    choice: TokenChoice
    score: float
    position: DecodePosition
    h_D: Tensor
    logsumexp: float
    candidate_ids_C: Tensor | None

    @property
    def others_V(self) -> Tensor:
        """True for each allowed token that was not compared or has no probability in the mixture, bool [V]."""
        allowed_V = self.position.allowed_V
        if allowed_V is None:
            raise ValueError("the answer is free")
        others_V = allowed_V.clone()
        if self.candidate_ids_C is not None and self.score > -math.inf:
            others_V[self.candidate_ids_C] = False
        return others_V


class HeldSelection:
    """Proves the choices of one generation, or keeps them open where other tokens may be more probable.

    Args:
        search: searches the tokens that were not compared.

    Attributes:
        unproven: choices that stand because the owner grants nothing that tells about other tokens.
    """

    def __init__(self, search: TokenSearch) -> None:
        self._search = search
        self.unproven = 0

    def proven(
        self,
        choices: Sequence[TokenChoice],
        positions: Sequence[DecodePosition],
        input_N_D: Tensor,
        logsumexp_N: Tensor,
        mixture: CandidateMixture | None,
    ) -> list[TokenChoice | OpenChoice]:
        """The choices, each open where another allowed token may be more probable.

        Args:
            choices: best of the tokens compared, at each position.
            positions: the positions.
            input_N_D: inputs of the LM head.
            logsumexp_N: log-sum-exp of all logits of the PLM.
            mixture: the allowed tokens compared; None for the PLM's top-1 alone.
        """
        results = list[TokenChoice | OpenChoice](choices)
        for row, (choice, position) in enumerate(zip(choices, positions, strict=True)):
            if position.allowed_V is None:
                continue
            score, top1_logprob = choice.plm_logprob, choice.plm_logprob
            if mixture is not None:
                score, top1_logprob = float(mixture.logprob_N_K[row].max()), float(mixture.plm.top1_logprob_N[row])
            if position.allows(choice.plm_token):
                # Nothing that was not compared exceeds the top-1, also where λ is 1 and leaves probability to none.
                if score == -math.inf:
                    results[row] = _outside(choice, choice.plm_token, top1_logprob)
                continue
            if mixture is None:
                score = -math.inf
            elif score > -math.inf and (position.noise or mixture.exceeds_others(row, score)):
                continue
            ids_C = None if mixture is None else mixture.candidate_ids_C
            compared = _Compared(choice, score, position, input_N_D[row].float(), float(logsumexp_N[row]), ids_C)
            results[row] = OpenChoice(partial(self._resolve, compared))
        return results

    def _resolve(self, compared: _Compared) -> TokenChoice:
        """The most probable allowed token.

        Raises:
            Unsupported: none of the tokens compared is allowed, and the owner grants nothing that tells about others.
        """
        choice, others_V = compared.choice, compared.others_V
        found = None
        if others_V.any():
            found = self._search.most_probable(others_V, compared.h_D, compared.logsumexp, compared.position.context)
            if found is None and compared.score > -math.inf:
                self.unproven += 1
        if found is None and compared.score == -math.inf:
            raise Unsupported(
                "Neither a candidate nor the PLM's most probable token can follow in a held answer, and the owner "
                "grants nothing that tells about other tokens.",
                hint="Use an adapter that learned such answers, ask the owner for head rows or the scope distribution, "
                "or decode with --no-hold.",
            )
        if found is None:
            return choice
        token, logprob = found
        rest = 1.0 - choice.lambda_t
        if compared.score > -math.inf and (rest <= 0.0 or compared.score >= math.log(rest) + logprob):
            return choice
        return _outside(choice, token, logprob)


def _outside(choice: TokenChoice, token: int, plm_logprob: float) -> TokenChoice:
    """The choice with a token to which the adapter gives no probability."""
    pema_logprob = None if choice.pema_logprob is None else -math.inf
    return replace(choice, token=token, plm_logprob=plm_logprob, pema_logprob=pema_logprob)
