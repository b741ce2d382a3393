"""Reductions over the whole vocabulary without N×V logits in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plm_owner_server.engines.ops.packed_linear import PackedLinear, can_pack
from plm_owner_server.engines.ops.to_host import to_host
from protocol.head import LMHead

# Rows × V float32 logits that exist at once on a GPU: 256 MiB.
_LOGITS_AT_ONCE = 2**26
# On a CPU, rows × tokens of the vocabulary at once: what stays in its cache between product and reduction. Twice as
# fast as all logits of 32 rows (V 262,144) at once.
_CPU_BLOCK = (512, 2048)
_PACKED_BLOCK = (128, 8192)


class VocabReduction:
    """All tokens as the LM head sees them.

    Args:
        head: of the model.
        packed: hold its weight once more, in the layout that a CPU multiplies by fastest, where there is one.
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
            self._rows, block = max(1, _LOGITS_AT_ONCE // vocab_size), vocab_size
        # Products with blocks of the vocabulary, by the first token of each.
        self._blocks = {
            start: _product(head.rows(slice(start, start + block)), packed=packed)
            for start in range(0, vocab_size, block)
        }

    def logsumexp_top1(self, last_hidden_N_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log-sum-exp over V, the most probable token (int64) and its logit, each [N]; logits are taken as float32."""
        parts = [self._reduced(rows_C_D) for rows_C_D in last_hidden_N_D.split(self._rows)]
        logsumexp_N, top1_N, top1_logit_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return logsumexp_N, top1_N, top1_logit_N

    def reduce_from_host(self, last_hidden_N_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the CPU to the CPU, wherever the head is."""
        return to_host(*self.logsumexp_top1(last_hidden_N_D.to(self._head.weight_V_D.device)))

    def _reduced(self, last_hidden_C_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = []
        for start, product in self._blocks.items():
            logits_C_K = self._head.of_products(product(last_hidden_C_D)).float()
            top_logit_C, top_C = logits_C_K.max(dim=-1)
            mass_C = logits_C_K.sub_(top_logit_C[:, None]).exp_().sum(dim=-1)  # relative to the block's top
            blocks.append((top_logit_C, top_C + start, mass_C))
        top_logit_C_M, top_C_M, mass_C_M = (torch.stack(column, dim=-1) for column in zip(*blocks, strict=True))
        top1_logit_C, at_C = top_logit_C_M.max(dim=-1)
        total_C = ((top_logit_C_M - top1_logit_C[:, None]).exp() * mass_C_M).sum(dim=-1)
        return top1_logit_C + total_C.log(), top_C_M.gather(-1, at_C[:, None])[:, 0], top1_logit_C


def _product(head: LMHead, *, packed: bool) -> Callable[[Tensor], Tensor]:
    return PackedLinear(head.weight_V_D, head.bias_V) if packed else head.products
