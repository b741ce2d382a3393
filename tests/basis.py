"""The secret basis in which a rotated tenant sees the model, found by comparison with what the model itself gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from data_owner_client.adapter.trained import TrainedAdapter


@dataclass(frozen=True)
class Basis:
    """Takes a tenant's view back to the model's own.

    Attributes:
        q_D_D: Q of f' = Q f, float64.
    """

    q_D_D: Tensor

    @classmethod
    def own(cls, size: int) -> Self:
        """The model's."""
        return cls(torch.eye(size, dtype=torch.float64))

    @classmethod
    def between(cls, seen_N_D: Tensor, true_N_D: Tensor) -> Self:
        """By which the same representations are seen so and so (orthogonal Procrustes)."""
        left, _, right = torch.linalg.svd(seen_N_D.double().T @ true_N_D.double())
        return cls(left @ right)

    def true(self, rows_N_D: Tensor) -> Tensor:
        """Representations in the model's own basis, float64."""
        return rows_N_D.double() @ self.q_D_D

    def weights(self, adapter: TrainedAdapter) -> dict[str, Tensor]:
        """The adapter's weights in the model's own basis."""
        weights = {name: value.double() for name, value in adapter.adapter.state_dict().items()}
        weights["A.weight"] = self.true(weights["A.weight"])
        weights["B_pd.weight"] = self.q_D_D.T @ weights["B_pd.weight"]
        if "E.weight" in weights:  # over two rows of the head, one behind the other
            weights["E.weight"] = weights["E.weight"] @ torch.block_diag(self.q_D_D, self.q_D_D)
        return weights
