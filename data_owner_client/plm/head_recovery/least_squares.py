"""LM-head rows as the solution of a linear least-squares problem, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# As shares of the largest eigenvalue. Representations are float32, so anything below the first share is noise.
_RIDGES = tuple(10.0**exponent for exponent in range(-14, 0))


class NormalEquations:
    """Sums over contexts that determine the rows: D × (D + C) values, independent of the number of contexts.

    Args:
        hidden_size: D.
        tokens: C, the number of tokens whose rows are needed.
        bias: whether the head has a bias, which is one more unknown for each token.
    """

    def __init__(self, hidden_size: int, tokens: int, *, bias: bool) -> None:
        self._bias = bias
        unknowns = hidden_size + bias
        self._gram_U_U = torch.zeros(unknowns, unknowns, dtype=torch.float64)
        self._cross_U_C = torch.zeros(unknowns, tokens, dtype=torch.float64)

    def add(self, input_N_D: Tensor, product_N_C: Tensor) -> None:
        """Add N contexts, by the head's input f and the products W f + b."""
        input_N_U = _with_one(input_N_D, bias=self._bias)
        self._gram_U_U.addmm_(input_N_U.T, input_N_U)
        self._cross_U_C.addmm_(input_N_U.T, product_N_C.double())

    def solve(self) -> Solutions:
        """Solve the equations for every ridge at once."""
        eigenvalue_U, vector_U_U = torch.linalg.eigh(self._gram_U_U)
        return Solutions(eigenvalue_U.clamp(min=0.0), vector_U_U, vector_U_U.T @ self._cross_U_C, bias=self._bias)


@dataclass(frozen=True)
class Solutions:
    """Solutions of the normal equations for every ridge, with U unknowns for each token.

    With fewer contexts than unknowns there are many solutions, and a ridge chooses the shortest. With noise, a ridge
    ignores the directions in which the contexts hardly differ, where only noise would be fitted.

    Attributes:
        eigenvalue_U: float64, eigenvalues of the contexts' Gram matrix, ascending.
        vector_U_U: float64, eigenvectors of the Gram matrix, as columns.
        cross_U_C: float64, the right-hand sides in the basis of the eigenvectors.
        bias: whether the last unknown is a bias.
    """

    eigenvalue_U: Tensor
    vector_U_U: Tensor
    cross_U_C: Tensor
    bias: bool

    def ridges(self) -> Iterator[float]:
        """Ridges to try, the weakest first."""
        largest = max(self.eigenvalue_U[-1].item(), torch.finfo(torch.float64).tiny)
        yield from (largest * share for share in _RIDGES)

    def products(self, input_N_D: Tensor, ridge: float) -> Tensor:
        """W f + b [N, C] of other contexts, float64; cheaper than computing W."""
        return (_with_one(input_N_D, bias=self.bias) @ self.vector_U_U / (self.eigenvalue_U + ridge)) @ self.cross_U_C

    def rows(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        """W [C, D] and b [C], float32; b is None if the head has no bias."""
        rows_U_C = self.vector_U_U @ (self.cross_U_C / (self.eigenvalue_U + ridge)[:, None])
        if not self.bias:
            return rows_U_C.T.float().contiguous(), None
        return rows_U_C[:-1].T.float().contiguous(), rows_U_C[-1].float()


def _with_one(input_N_D: Tensor, *, bias: bool) -> Tensor:
    input_N_D = input_N_D.double()
    return torch.cat([input_N_D, input_N_D.new_ones(len(input_N_D), 1)], dim=1) if bias else input_N_D
