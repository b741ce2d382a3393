"""A learned gate: λ_t from the distributions of PLM and adapter at a position, instead of a fixed schedule.

λ_t = σ(w · x) with eleven features x. They are a constant 1, each side's confidence (the probability of its favourite,
the entropy), and each side's probability of the other's favourite. The rest are agreement of the two favourites, the
PLM's mass outside the candidates, and the position.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

# L2 penalty: few validation rows would otherwise lead to large weights.
_DECAY = 1e-3
_MIN_LOGPROB = -12.0
_FOLDS = 5

FEATURES = 11
"""F, the number of features."""


class Gate(BaseModel):
    """The gate's parameters.

    Attributes:
        weight: weight of each feature; the first feature is 1.
        centre: mean of each feature on the rows of the fit.
        scale: standard deviation of each feature on the rows of the fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: tuple[float, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]

    def lambdas(self, features_N_F: Tensor) -> Tensor:
        """λ of each row, float64 [N] in (0, 1)."""
        weight_F, centre_F, scale_F = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weight, self.centre, self.scale)
        )
        return (((features_N_F - centre_F) / scale_F) @ weight_F).sigmoid().clamp(1e-6, 1 - 1e-6)

    @classmethod
    def fit(cls, features_N_F: Tensor, plm_logprob_N: Tensor, pema_logprob_N: Tensor) -> Gate:
        """Fit the gate of the highest mixture likelihood.

        Args:
            features_N_F: result of `gate_features`.
            plm_logprob_N: log P_PLM(y), float64.
            pema_logprob_N: log P_PEMA(y), float64; −∞ where y is no candidate.
        """
        centre_F, scale_F = features_N_F.mean(0), features_N_F.std(0, correction=0).clamp(min=1e-6)
        centre_F[0], scale_F[0] = 0.0, 1.0
        x_N_F = (features_N_F - centre_F) / scale_F
        weight_F = torch.zeros(x_N_F.shape[1], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight_F], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            gate_N = x_N_F @ weight_F
            mixture_N = torch.logaddexp(F.logsigmoid(-gate_N) + plm_logprob_N, F.logsigmoid(gate_N) + pema_logprob_N)
            value = _DECAY * weight_F.square().sum() - mixture_N.mean()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        return cls(weight=weight_F.tolist(), centre=centre_F.tolist(), scale=scale_F.tolist())


def gate_features(plm_logprob_N_C: Tensor, pema_logprob_N_C: Tensor, position_N: Tensor) -> Tensor:
    """The gate's features, float64 [N, 11].

    Args:
        plm_logprob_N_C: log P_PLM of the candidates.
        pema_logprob_N_C: log P_PEMA of the candidates.
        position_N: int64, t counted from 0.
    """
    plm_N_C, pema_N_C = plm_logprob_N_C.double(), pema_logprob_N_C.double()
    plm_best_N, plm_index_N = plm_N_C.max(dim=-1)
    pema_best_N, pema_index_N = pema_N_C.max(dim=-1)
    features = [
        torch.ones_like(plm_best_N),
        plm_best_N,
        pema_best_N,
        plm_N_C.gather(1, pema_index_N[:, None])[:, 0],
        pema_N_C.gather(1, plm_index_N[:, None])[:, 0],
        (plm_index_N == pema_index_N).double(),
        _entropy(plm_N_C),
        _entropy(pema_N_C),
        1.0 - plm_N_C.exp().sum(dim=-1),
        (position_N == 0).double(),
        position_N.double().log1p(),
    ]
    return torch.stack([feature.clamp(min=_MIN_LOGPROB) for feature in features], dim=1)


def cross_validated_nll(
    features_N_F: Tensor, plm_logprob_N: Tensor, pema_logprob_N: Tensor, position_N: Tensor
) -> tuple[float, float]:
    """Cross-validated negative log-likelihood per token in nats, and the mean λ.

    Each row's gate is fitted on the other folds. Examples, which begin where the position is 0, stay whole.

    Args:
        features_N_F: result of `gate_features`.
        plm_logprob_N: log P_PLM(y), float64.
        pema_logprob_N: log P_PEMA(y), float64; −∞ where y is no candidate.
        position_N: int64, t counted from 0.
    """
    fold_N = (position_N == 0).cumsum(0) % _FOLDS
    lambda_N = torch.empty_like(plm_logprob_N)
    for fold in fold_N.unique():
        held_out_N = fold_N == fold
        fit_N = ~held_out_N if bool((~held_out_N).any()) else held_out_N
        gate = Gate.fit(features_N_F[fit_N], plm_logprob_N[fit_N], pema_logprob_N[fit_N])
        lambda_N[held_out_N] = gate.lambdas(features_N_F[held_out_N])
    mixture_N = torch.logaddexp(torch.log1p(-lambda_N) + plm_logprob_N, lambda_N.log() + pema_logprob_N)
    return -mixture_N.mean().item(), lambda_N.mean().item()


def _entropy(logprob_N_C: Tensor) -> Tensor:
    return -(logprob_N_C.exp() * logprob_N_C.clamp(min=-50.0)).sum(dim=-1)
