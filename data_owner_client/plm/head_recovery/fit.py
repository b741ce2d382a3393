"""Rows of the LM head from the distributions that were answered, and how good they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.plm.head_recovery.distributions import Distributions
from data_owner_client.plm.head_recovery.least_squares import NormalEquations
from protocol.errors import InvalidData
from protocol.head import LMHead
from protocol.messages import ModelCard

# In nats: with rows that are further off, what goes for the PLM's probabilities would be others.
_MOST_ERROR = 0.5
# Of so many contexts one is kept out of the fit, and tells how good it is.
_UNSEEN_EVERY = 16
_FEWEST = 2


def contexts_needed(card: ModelCard) -> int:
    """Contexts for an exact fit: one for each unknown, and a tenth more, at least 16, of which some are kept out."""
    unknowns = card.hidden_size + card.head_bias
    return unknowns + max(_UNSEEN_EVERY, unknowns // 10)


@dataclass(frozen=True)
class FittedHead:
    """Rows of the LM head that were worked out.

    Attributes:
        head: of the tokens that were asked for, float32. A factor on the logits is part of the rows.
        contexts: that they were fitted to.
        unseen: contexts that they were not fitted to.
        error: of log P(v|c) on these, root mean square over the tokens, in nats.
    """

    head: LMHead
    contexts: int
    unseen: int
    error: float

    def __str__(self) -> str:
        """In words."""
        return (
            f"{len(self.head.weight_V_D):,} rows of the LM head, worked out from {self.contexts:,} full distributions; "
            f"on {self.unseen:,} others log P is off by {self.error:.2g} nats (root mean square)"
        )


def fit_rows(given: Distributions, token_ids_C: Tensor) -> FittedHead:
    """The rows of some tokens from all that is answered. In memory are D × (D + C) values, however much that is.

    Raises:
        InvalidData: too little is answered, a file is damaged, or the rows are too far off.
    """
    card, keys = given.card, given.keys()
    if len(keys) < _FEWEST:
        raise InvalidData(
            "The owner gives no rows of the LM head, and on this machine they were not worked out yet.",
            hint="pema-client train does so.",
        )
    shape = LMHead(torch.empty(0, card.hidden_size), softcap=card.softcap)  # what acts after the rows
    fitted = [key for number, key in enumerate(keys) if number % _UNSEEN_EVERY]
    equations = NormalEquations(card.hidden_size, len(token_ids_C), bias=card.head_bias)
    for input_N_D, logit_N_C in given.blocks(fitted, token_ids_C):
        equations.add(input_N_D, shape.products_of(logit_N_C))
    solutions = equations.solve()
    unseen = list(given.blocks(keys[::_UNSEEN_EVERY], token_ids_C))

    def error(ridge: float) -> float:
        squares = [
            (shape.of_products(solutions.products(input_N_D, ridge)) - logit_N_C).square()
            for input_N_D, logit_N_C in unseen
        ]
        return torch.cat(squares).mean().sqrt().item()

    # How noisy the answers are follows from the dtype that the owner computes in, so it is found out.
    least, ridge = min((error(ridge), ridge) for ridge in solutions.ridges())
    if not least <= _MOST_ERROR:
        raise _too_far_off(card, least, len(keys))
    weight_C_D, bias_C = solutions.rows(ridge)
    return FittedHead(LMHead(weight_C_D, bias_C, 1.0, card.softcap), len(fitted), len(keys) - len(fitted), least)


def _too_far_off(card: ModelCard, error: float, answered: int) -> InvalidData:
    wanted = contexts_needed(card)
    hint = (
        f"Ask for more: --distributions {wanted}." if answered < wanted else "Ask the owner for the policy candidate."
    )
    off = f"{error:.2g}" if math.isfinite(error) else "no number of"
    return InvalidData(
        f"Rows of the LM head that are worked out from {answered} full distributions are too far off: log P by {off} "
        f"nats on contexts that they were not fitted to, where {_MOST_ERROR} is the most.",
        hint=hint,
    )
