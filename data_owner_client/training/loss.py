"""Cross-entropy of the LM head's softmax without logits of all rows in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.head import LMHead


class _InChunks(torch.autograd.Function):
    """The gradient is made with the loss, chunk by chunk: nothing of the size of the logits outlives a chunk."""

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
        hidden_N_D: the head's input; the gradient goes here alone.
        head: of C tokens; fixed.
        label_N: int64 in [0, C).
        chunk_rows: rows whose logits exist at the same time.
    """
    chunk_rows = chunk_rows or head.rows_at_once()
    loss: Tensor = _InChunks.apply(hidden_N_D, head, label_N, chunk_rows)  # type: ignore[no-untyped-call]
    return loss
