"""Reductions over the whole vocabulary without N×V logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.head import LMHead

# Rows × V float32 logits that exist at once on a GPU: 256 MiB.
_LOGITS_AT_ONCE = 2**26
# On a CPU, rows × tokens of the vocabulary at once: what stays in its cache between product and reduction. Twice as
# fast as all logits of 32 rows (V 262,144) at once.
_CPU_BLOCK = (512, 2048)


def logsumexp_top1(head: LMHead, last_hidden_N_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp over V, the most probable token (int64) and its logit, each [N]; logits are taken as float32."""
    vocab_size = len(head.weight_V_D)
    on_cpu = last_hidden_N_D.device.type == "cpu"
    rows, columns = _CPU_BLOCK if on_cpu else (max(1, _LOGITS_AT_ONCE // vocab_size), vocab_size)
    parts = [_block(head, block_C_D, columns) for block_C_D in last_hidden_N_D.split(rows)]
    logsumexp_N, top1_N, top1_logit_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return logsumexp_N, top1_N, top1_logit_N


def _block(head: LMHead, last_hidden_C_D: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    blocks = []
    for start in range(0, len(head.weight_V_D), columns):
        logits_C_K = head.rows(slice(start, start + columns)).logits(last_hidden_C_D).float()
        top_logit_C, top_C = logits_C_K.max(dim=-1)
        mass_C = logits_C_K.sub_(top_logit_C[:, None]).exp_().sum(dim=-1)  # relative to the block's top
        blocks.append((top_logit_C, top_C + start, mass_C))
    top_logit_C_M, top_C_M, mass_C_M = (torch.stack(column, dim=-1) for column in zip(*blocks, strict=True))
    top1_logit_C, at_C = top_logit_C_M.max(dim=-1)
    total_C = ((top_logit_C_M - top1_logit_C[:, None]).exp() * mass_C_M).sum(dim=-1)
    return top1_logit_C + total_C.log(), top_C_M.gather(-1, at_C[:, None])[:, 0], top1_logit_C
