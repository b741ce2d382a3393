"""Choice between decoding policies by the scores of a few texts, which must not jump when the scores are noisy."""

from __future__ import annotations

import torch
from torch import Tensor

# Resamples of the texts. Their mean is exact to a hundredth.
_RESAMPLES = 1000
_SEED = 0
_ROUNDING = 1e-6
# Standard deviation of the best value for whole texts around the likeliest one for single tokens.
_LIKELIEST_ERROR = 0.15


def supported_maximum(value_P: Tensor, score_P_E: Tensor, *, likeliest: float) -> float:
    """Value that the scores of a few texts and the likelihood of all of them support together.

    A parabola through the mean scores has its maximum where all values together put it. Resamples of the texts move it
    (bagging: Breiman 1996); their variance tells how little the texts know. The mean maximum and the likeliest value
    are weighted by the inverse of their variances, as two independent measurements of one quantity. So the scores
    decide where they are clear, and the likelihood where they are noise.

    Args:
        value_P: P ≥ 3 different values, float64.
        score_P_E: score of each of E texts with each value.
        likeliest: value with the highest likelihood of all targets.
    """
    maximum_S = _maximum_of_parabola(value_P.double(), _resampled_means(score_P_E))
    variance = maximum_S.var(correction=0).item()
    trust = _LIKELIEST_ERROR**2 / (variance + _LIKELIEST_ERROR**2)
    return trust * maximum_S.mean().item() + (1 - trust) * likeliest


def bagged_maximum(value_P: Tensor, score_P_E: Tensor) -> float:
    """Value at which the mean score is highest, averaged over resamples of the texts; for a fine grid of values.

    Args:
        value_P: P different values, float64.
        score_P_E: score of each of E texts with each value.
    """
    best_S = _resampled_means(score_P_E).argmax(dim=0)
    return value_P[best_S].mean().item()


def _resampled_means(score_P_E: Tensor) -> Tensor:
    """Mean scores of resamples of the texts, float64 [P, S]."""
    texts = score_P_E.shape[1]
    rng = torch.Generator().manual_seed(_SEED)
    drawn_S_E = torch.randint(texts, (_RESAMPLES, texts), generator=rng)
    weight_S_E = torch.zeros(_RESAMPLES, texts, dtype=torch.float64)
    weight_S_E.scatter_add_(1, drawn_S_E, torch.ones_like(weight_S_E))
    return score_P_E.double() @ weight_S_E.T / texts


def _maximum_of_parabola(value_P: Tensor, score_P_S: Tensor) -> Tensor:
    """Maximum of the least-squares parabola through each column, within the values."""
    powers_P_3 = torch.stack([torch.ones_like(value_P), value_P, value_P.square()], dim=1)
    _, slope_S, curvature_S = torch.linalg.lstsq(powers_P_3, score_P_S).solution
    low, high = value_P.min(), value_P.max()
    ends_S = torch.where(slope_S + curvature_S * (low + high) > 0, high, low)
    vertex_S = (-slope_S / (2 * curvature_S)).nan_to_num().clamp(low, high)
    return torch.where(curvature_S < 0, vertex_S, ends_S)


def clearly_better(score_E: Tensor, other_E: Tensor) -> bool:
    """Return True if the mean score of the same texts is higher by more than the standard error of the difference.

    The rule of one standard error prefers the simpler of two nearly equal choices (Breiman et al. 1984, section 3.4.3).
    """
    difference_E = score_E - other_E
    error = difference_E.std(correction=0) / max(1, len(difference_E) - 1) ** 0.5
    # If a single text differs, the mean equals the error, and rounding must not decide which of them is larger.
    return bool(difference_E.mean() > (1 + _ROUNDING) * error)
