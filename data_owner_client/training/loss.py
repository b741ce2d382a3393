"""Cross-entropy through the LM head that never holds the logits of all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.head import LMHead


class _InChunks(torch.autograd.Function):
    """Cross-entropy whose gradient is computed with the loss, so that no chunk's logits outlive the chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_N_D: Tensor, head: LMHead, label_N: Tensor, chunk_rows: int) -> Tensor:
        losses, gradients = [], []
        chunks = zip(hidden_N_D.detach().split(chunk_rows), label_N.split(chunk_rows), strict=True)
        with torch.enable_grad():
            for hidden_B_D, label_B in chunks:
                hidden_B_D.requires_grad_()
                logits_B_C = head.logits(hidden_B_D).float()
                loss = F.cross_entropy(logits_B_C, label_B, reduction="sum")
                gradients += torch.autograd.grad(loss, hidden_B_D)
                losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients) / len(hidden_N_D))
        return torch.stack(losses).sum() / len(hidden_N_D)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_N_D,) = ctx.saved_tensors
        return gradient_N_D * gradients[0], None, None, None


def cross_entropy(hidden_N_D: Tensor, head: LMHead, label_N: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """Mean of −log softmax(head(h))[y] over the rows.

    Args:
        hidden_N_D: input of the head; the only argument with a gradient.
        head: LM-head rows of C tokens; constant.
        label_N: int64 in [0, C).
        chunk_rows: number of rows whose logits exist at the same time; None for as many as the head suggests.
    """
    chunk_rows = chunk_rows or head.rows_per_chunk()
    loss: Tensor = _InChunks.apply(hidden_N_D, head, label_N, chunk_rows)  # type: ignore[no-untyped-call]
    return loss
