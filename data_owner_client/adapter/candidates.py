"""The candidate vocabulary V': sets of token ids as sorted int64 tensors, and the index of a token in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_set(tokens: Sequence[Tensor]) -> Tensor:
    """Sorted distinct token ids (int64) of several tensors."""
    ids_C: Tensor = torch.unique(torch.cat([part.long() for part in tokens]))
    return ids_C


def index_of(token_ids: Tensor, candidate_ids_C: Tensor) -> Tensor:
    """Index of each token among the sorted candidates; −1 for a token outside them."""
    index = torch.searchsorted(candidate_ids_C, token_ids).clamp(max=len(candidate_ids_C) - 1)
    return torch.where(candidate_ids_C[index] == token_ids, index, -1)
