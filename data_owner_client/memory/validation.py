"""Validation of memory rows that were read from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from data_owner_client.memory.rows import MemoryRows
from data_owner_client.plm.identity import ModelIdentity

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def is_valid(rows: MemoryRows, model: ModelIdentity) -> bool:
    """Return True if every column has the shape, dtype and range that the model requires."""
    counts_E, target_N = rows.rows_E, rows.target_N
    if not (_ids(counts_E, 1) and _ids(target_N, 0, model.vocab_size) and _ids(rows.source_tokens_E, 0)):
        return False
    n, d = len(target_N), model.hidden_size
    if len(rows.source_tokens_E) != len(counts_E) or int(counts_E.sum()) != n:
        return False
    numbers = ((rows.cr_N_D, rows.cr_scale_N), (rows.last_hidden_N_D, rows.last_hidden_scale_N))
    if not all(_representations(values, scale, n, d) for values, scale in numbers if values is not None):
        return False
    if rows.logsumexp_N is not None and not _finite(rows.logsumexp_N, (n,)):
        return False
    if rows.context_N is None:
        return rows.matches_N is None and rows.reliable_N is None
    for flag_N in (rows.matches_N, rows.reliable_N):
        if flag_N is None or flag_N.dtype != torch.uint8 or flag_N.shape != (n,):
            return False
    length_N = counts_E.long().repeat_interleave(counts_E.long())
    return _ids(rows.context_N, 0) and len(rows.context_N) == n and bool((rows.context_N < length_N).all())


def _ids(values: Tensor, minimum: int, end: int | None = None) -> bool:
    if values.ndim != 1 or values.dtype not in (torch.int32, torch.int64):
        return False
    return not len(values) or (int(values.min()) >= minimum and (end is None or int(values.max()) < end))


def _representations(values_N_D: Tensor, scale_N: Tensor | None, n: int, d: int) -> bool:
    if values_N_D.dtype == torch.int8:
        return values_N_D.shape == (n, d) and scale_N is not None and _finite(scale_N, (n,))
    return _finite(values_N_D, (n, d)) and scale_N is None


def _finite(values: Tensor, shape: tuple[int, ...]) -> bool:
    return values.dtype in _FLOATS and values.shape == shape and bool(values.isfinite().all())
