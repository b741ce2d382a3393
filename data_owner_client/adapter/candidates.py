"""The candidate vocabulary V': sets of token ids as sorted int64 tensors, and where a token is among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_set(tokens: Sequence[Tensor]) -> Tensor:
    """Sorted distinct token ids (int64) of several tensors."""
    ids_K: Tensor = torch.unique(torch.cat([part.long() for part in tokens]))
    return ids_K


def index_of(token_ids: Tensor, candidate_ids_C: Tensor) -> Tensor:
    """Index of each token among the candidates, which are sorted; −1 where it is none of them."""
    at = torch.searchsorted(candidate_ids_C, token_ids).clamp(max=len(candidate_ids_C) - 1)
    return torch.where(candidate_ids_C[at] == token_ids, at, -1)
