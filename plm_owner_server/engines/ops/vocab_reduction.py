"""Log-sum-exp and top-1 over the whole vocabulary without N×V logits in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plm_owner_server.engines.ops.packed_linear import PackedLinear, can_pack
from protocol.head import LMHead

# Float32 logits (rows × V) in memory at once on a GPU: 256 MiB.
_MAX_GPU_LOGITS = 2**26
# On a CPU, (rows, tokens of the vocabulary) in memory at once: they stay in its cache between product and reduction.
# Twice as fast as all logits of 32 rows at once (V = 262,144).
_CPU_BLOCK = (512, 2048)
_PACKED_BLOCK = (128, 8192)


class VocabReduction:
    """Reductions over the logits of all tokens, computed in blocks of rows and of the vocabulary.

    Shapes: U tokens in a block of the vocabulary, M blocks.

    Args:
        head: the model's LM head.
        packed: also hold a copy of its weight in the layout that a CPU multiplies by fastest, if there is one.
    """

    def __init__(self, head: LMHead, *, packed: bool) -> None:
        self._head = head
        vocab_size = len(head.weight_V_D)
        packed = packed and can_pack(head.weight_V_D)
        if packed:
            self._rows, block = _PACKED_BLOCK
        elif head.weight_V_D.device.type == "cpu":
            self._rows, block = _CPU_BLOCK
        else:
            self._rows, block = max(1, _MAX_GPU_LOGITS // vocab_size), vocab_size
        # Products with the blocks of the vocabulary, by the first token of each block.
        self._blocks = {
            start: _product(head.rows(slice(start, start + block)), packed=packed)
            for start in range(0, vocab_size, block)
        }

    def logsumexp_top1(self, last_hidden_N_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum-exp over V, the most probable token (int64) and its logit, each [N], computed in float32."""
        parts = [self._reduce_rows(rows_N_D) for rows_N_D in last_hidden_N_D.split(self._rows)]
        if len(parts) == 1:
            return parts[0]
        logsumexp_N, top1_N, top1_logit_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return logsumexp_N, top1_N, top1_logit_N

    def _reduce_rows(self, last_hidden_N_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = []
        for start, product in self._blocks.items():
            logits_N_U = self._head.logits_from_products(product(last_hidden_N_D)).float()
            top_logit_N, top_N = logits_N_U.max(dim=-1)
            mass_N = logits_N_U.sub_(top_logit_N[:, None]).exp_().sum(dim=-1)  # relative to the block's top
            blocks.append((top_logit_N, top_N + start, mass_N))
        if len(blocks) == 1:  # as on a GPU: eleven launches less
            ((top_logit_N, top_N, mass_N),) = blocks
            return top_logit_N + mass_N.log(), top_N, top_logit_N
        top_logit_N_M, top_N_M, mass_N_M = (torch.stack(column, dim=-1) for column in zip(*blocks, strict=True))
        top1_logit_N, block_N = top_logit_N_M.max(dim=-1)
        total_N = ((top_logit_N_M - top1_logit_N[:, None]).exp() * mass_N_M).sum(dim=-1)
        return top1_logit_N + total_N.log(), top_N_M.gather(-1, block_N[:, None])[:, 0], top1_logit_N


def _product(head: LMHead, *, packed: bool) -> Callable[[Tensor], Tensor]:
    return PackedLinear(head.weight_V_D, head.bias_V) if packed else head.products
