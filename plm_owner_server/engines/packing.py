"""Weights in the layout that oneDNN multiplies by fastest, for models in float32 on a CPU.

torch gives such products to MKL, which arranges the weights anew in every call. With the few rows of a decoding step
that takes longer than the product: packed once, it is two to four times as fast (`benchmarks.packing`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Rows that the layout is chosen for; it serves other numbers nearly as well.
_USUAL_ROWS = 32


def can_pack(weight: Tensor) -> bool:
    """Whether a matrix has such a layout here."""
    # Not public, but what torch's own compiler makes of a linear layer on a CPU.
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available() and known
    )


class PackedLinear(nn.Module):
    """x Wᵀ + b.

    Args:
        weight: W [out, in], float32 on the CPU; not kept.
        bias: b [out].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _USUAL_ROWS)

    @property
    def weight(self) -> Tensor:
        """W, unpacked anew each time: a few architectures look at it."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return result


def pack_linear_layers(module: nn.Module) -> None:
    """Put packed layers in the place of a module's linear ones, as far as that can be done."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            # No subclass, which may hold its weights in other ways.
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
