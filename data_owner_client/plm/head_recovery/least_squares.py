"""Rows of the LM head as the solution of a linear least-squares problem, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the largest eigenvalue. Representations come in float32, so what is below the first of them is noise.
_RIDGES = tuple(10.0**exponent for exponent in range(-14, 0))


class NormalEquations:
    """Sums over contexts from which rows follow: D × (D + C) values, however many contexts there are.

    Args:
        hidden_size: D.
        tokens: C, whose rows are wanted.
        bias: whether the head has one: one unknown more for each token.
    """

    def __init__(self, hidden_size: int, tokens: int, *, bias: bool) -> None:
        self._bias = bias
        unknowns = hidden_size + bias
        self._gram_U_U = torch.zeros(unknowns, unknowns, dtype=torch.float64)
        self._cross_U_C = torch.zeros(unknowns, tokens, dtype=torch.float64)

    def add(self, input_N_D: Tensor, product_N_C: Tensor) -> None:
        """Count contexts in: the head's input, and the products W f + b that they gave."""
        input_N_U = _with_one(input_N_D, bias=self._bias)
        self._gram_U_U.addmm_(input_N_U.T, input_N_U)
        self._cross_U_C.addmm_(input_N_U.T, product_N_C.double())

    def solve(self) -> Solutions:
        """Rows for every strength of the ridge."""
        eigenvalue_U, vector_U_U = torch.linalg.eigh(self._gram_U_U)
        return Solutions(eigenvalue_U.clamp(min=0.0), vector_U_U, vector_U_U.T @ self._cross_U_C, bias=self._bias)


@dataclass(frozen=True)
class Solutions:
    """Rows that fit, one set for each strength of the ridge.

    With fewer contexts than unknowns there are many solutions, and a ridge takes the shortest; with noise it ignores
    the directions in which the contexts hardly differ, where the noise would be all that is fitted.

    Attributes:
        eigenvalue_U: of the contexts' Gram matrix.
        vector_U_U: its eigenvectors, as columns.
        cross_U_C: the right-hand sides in that basis.
        bias: whether the last unknown is a bias.
    """

    eigenvalue_U: Tensor
    vector_U_U: Tensor
    cross_U_C: Tensor
    bias: bool

    def ridges(self) -> Iterator[float]:
        """Strengths to try, the weakest first."""
        largest = max(self.eigenvalue_U[-1].item(), torch.finfo(torch.float64).tiny)
        yield from (largest * share for share in _RIDGES)

    def products(self, input_N_D: Tensor, ridge: float) -> Tensor:
        """W f + b of other contexts, [N, C]; less work than to make W."""
        return (_with_one(input_N_D, bias=self.bias) @ self.vector_U_U / (self.eigenvalue_U + ridge)) @ self.cross_U_C

    def rows(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        """W [C, D] and b [C] in float32; None for no bias."""
        rows_U_C = self.vector_U_U @ (self.cross_U_C / (self.eigenvalue_U + ridge)[:, None])
        if not self.bias:
            return rows_U_C.T.float().contiguous(), None
        return rows_U_C[:-1].T.float().contiguous(), rows_U_C[-1].float()


def _with_one(input_N_D: Tensor, *, bias: bool) -> Tensor:
    input_N_D = input_N_D.double()
    return torch.cat([input_N_D, input_N_D.new_ones(len(input_N_D), 1)], dim=1) if bias else input_N_D
