"""Rows of positions between vLLM's processes and the server: which are requested, and their layout in bytes.

A row is the head's input at one position in the model's dtype, then 16 bytes: log-sum-exp and largest logit (float32),
the token of that logit (int32; -1 if it is the one that was sampled), and the token that was run (int32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

SAMPLED = -1
"""Token of the largest logit in a row whose token was sampled: the result of the request has it."""

_KEY = "pema"  # in SamplingParams.extra_args
_NUMBER_BYTES = 16
# Logits of a block of the vocabulary stay in a CPU's cache between the passes of the reduction.
_CPU_BLOCK_LOGITS = 2**18


@dataclass(frozen=True)
class RowRequest:
    """Requested rows of one text.

    Attributes:
        start: first position with a row.
        scored_from: first position whose row has log-sum-exp and top-1; None for none.
        prompt_tokens: number of tokens of the prompt.
    """

    start: int
    scored_from: int | None
    prompt_tokens: int

    def to_extra_args(self) -> dict[str, Any]:
        """The value of `SamplingParams.extra_args` that carries the request to the workers."""
        return {_KEY: [self.start, self.scored_from, self.prompt_tokens]}

    @classmethod
    def of(cls, sampling_params: Any) -> Self | None:
        """The request that sampling parameters carry; None for vLLM's own, such as those of its profiling."""
        extra = getattr(sampling_params, "extra_args", None) or {}
        return cls(*extra[_KEY]) if _KEY in extra else None


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of consecutive positions of one text.

    Attributes:
        hidden_N_D: inputs of the LM head, in the model's dtype.
        logsumexp_N: log Σ_v exp(logit_v), float32; NaN where it was not requested.
        top1_logit_N: largest logit, float32; NaN where it was not requested.
        top1_N: int32, the token of the largest logit; `SAMPLED` where it was sampled or not requested.
        token_ids_N: int32, the token that was run at each position.
    """

    hidden_N_D: Tensor
    logsumexp_N: Tensor
    top1_logit_N: Tensor
    top1_N: Tensor
    token_ids_N: Tensor


def pack_rows(rows: Rows) -> Tensor:
    """Rows as bytes, uint8 [N, bytes of a row], on their device."""
    hidden_N_D = rows.hidden_N_D
    width = hidden_N_D.shape[1] * hidden_N_D.element_size()
    packed_N_B = torch.empty(len(hidden_N_D), width + _NUMBER_BYTES, dtype=torch.uint8, device=hidden_N_D.device)
    packed_N_B[:, :width] = hidden_N_D.view(torch.uint8)
    columns = (rows.logsumexp_N, rows.top1_logit_N, rows.top1_N, rows.token_ids_N)
    for i, column_N in enumerate(columns):
        start = width + column_N.element_size() * i
        packed_N_B[:, start : start + column_N.element_size()] = column_N.view(torch.uint8).view(len(column_N), -1)
    return packed_N_B


def unpack_rows(packed_N_B: np.ndarray[Any, Any], dtype: torch.dtype) -> Rows:
    """Rows from bytes on the CPU.

    Args:
        packed_N_B: result of `pack_rows`, rows of several passes joined.
        dtype: dtype of the head's input.
    """
    bytes_N_B = torch.from_numpy(np.require(packed_N_B, requirements=["C", "W"]))
    width = bytes_N_B.shape[1] - _NUMBER_BYTES
    floats_N_2 = bytes_N_B[:, width : width + 8].contiguous().view(torch.float32)
    tokens_N_2 = bytes_N_B[:, width + 8 :].contiguous().view(torch.int32)
    return Rows(
        hidden_N_D=bytes_N_B[:, :width].contiguous().view(dtype),
        logsumexp_N=floats_N_2[:, 0],
        top1_logit_N=floats_N_2[:, 1],
        top1_N=tokens_N_2[:, 0],
        token_ids_N=tokens_N_2[:, 1],
    )


def reduce_logits(logits_N_V: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and largest logit of each row, float32 [N]."""
    top_logit_N = logits_N_V.amax(dim=-1).float()
    if logits_N_V.device.type != "cpu":
        return torch.logsumexp(logits_N_V.float(), dim=-1), top_logit_N
    mass_N = torch.zeros_like(top_logit_N)
    for block_N_U in logits_N_V.split(max(1, _CPU_BLOCK_LOGITS // len(logits_N_V)), dim=-1):
        mass_N += block_N_U.float().sub(top_logit_N[:, None]).exp_().sum(dim=-1)
    return top_logit_N + mass_N.log(), top_logit_N
