"""LM-head rows fitted to the stored distributions, with an estimate of their error."""

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

# In nats. Rows with a larger error would not reproduce the PLM's probabilities.
_MAX_ERROR = 0.5
# One of this many contexts is held out of the fit, to measure its error.
_HELD_OUT_EVERY = 16
_MIN_CONTEXTS = 2


def contexts_needed(card: ModelCard) -> int:
    """Contexts for an exact fit: one for each unknown and a tenth more, at least 16, of which some are held out."""
    unknowns = card.hidden_size + card.head_bias
    return unknowns + max(_HELD_OUT_EVERY, unknowns // 10)


@dataclass(frozen=True)
class FittedHead:
    """Recovered rows of the LM head.

    Attributes:
        head: float32 rows of the requested tokens. They include any factor on the logits.
        contexts: number of contexts in the fit.
        held_out: number of contexts that were held out of the fit.
        error: error of log P(v|c) on the held-out contexts, root mean square over the tokens, in nats.
    """

    head: LMHead
    contexts: int
    held_out: int
    error: float

    def __str__(self) -> str:
        """Describe the fit in one line."""
        return (
            f"{len(self.head.weight_V_D):,} rows of the LM head, recovered from {self.contexts:,} full distributions; "
            f"on {self.held_out:,} others log P is off by {self.error:.2g} nats (root mean square)"
        )


def fit_rows(distributions: Distributions, token_ids_C: Tensor) -> FittedHead:
    """Fit the rows of some tokens to all stored distributions.

    Needs memory for D × (D + C) values, independent of the number of contexts.

    Args:
        distributions: stored distributions of the model.
        token_ids_C: ids of the tokens whose rows are needed.

    Raises:
        InvalidData: there are too few distributions, a file is damaged, or the error is too large.
    """
    card, keys = distributions.card, distributions.keys()
    if len(keys) < _MIN_CONTEXTS:
        raise InvalidData(
            "The owner gives no rows of the LM head, and this machine has not recovered them yet.",
            hint="pema-client train does so.",
        )
    shape = LMHead(
        torch.empty(0, card.hidden_size), softcap=card.softcap
    )  # the function that follows the product with the rows
    fitted_keys = [key for number, key in enumerate(keys) if number % _HELD_OUT_EVERY]
    equations = NormalEquations(card.hidden_size, len(token_ids_C), bias=card.head_bias)
    for input_N_D, logit_N_C in distributions.blocks(fitted_keys, token_ids_C):
        equations.add(input_N_D, shape.products_from_logits(logit_N_C))
    solutions = equations.solve()
    held_out = list(distributions.blocks(keys[::_HELD_OUT_EVERY], token_ids_C))

    def error(ridge: float) -> float:
        squares = [
            (shape.logits_from_products(solutions.products(input_N_D, ridge)) - logit_N_C).square()
            for input_N_D, logit_N_C in held_out
        ]
        return torch.cat(squares).mean().sqrt().item()

    # The noise depends on the dtype in which the owner computes, so the held-out contexts choose the ridge.
    lowest_error, ridge = min((error(ridge), ridge) for ridge in solutions.ridges())
    if not lowest_error <= _MAX_ERROR:
        raise _too_far_off(card, lowest_error, len(keys))
    weight_C_D, bias_C = solutions.rows(ridge)
    return FittedHead(
        LMHead(weight_C_D, bias_C, 1.0, card.softcap), len(fitted_keys), len(keys) - len(fitted_keys), lowest_error
    )


def _too_far_off(card: ModelCard, error: float, contexts: int) -> InvalidData:
    needed = contexts_needed(card)
    hint = (
        f"Ask for more: --head-contexts {needed}." if contexts < needed else "Ask the owner for the policy candidate."
    )
    off = f"{error:.2g}" if math.isfinite(error) else "no number of"
    return InvalidData(
        f"The rows of the LM head recovered from {contexts} full distributions are too far off: log P by {off} nats "
        f"on contexts that they were not fitted to; the limit is {_MAX_ERROR}.",
        hint=hint,
    )
