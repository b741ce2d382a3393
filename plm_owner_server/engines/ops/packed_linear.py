"""Weights in the layout that oneDNN multiplies by fastest, for models in float32 on a CPU.

torch gives such products to MKL, which arranges the weights anew in every call. With the few rows of a decoding step
that takes longer than the product: packed once, it is two to four times as fast (`benchmarks.packing`).
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows that the layout is chosen for; it serves other numbers nearly as well.
_USUAL_ROWS = 32
# Numbers of rows that are really multiplied: oneDNN makes a kernel of about a MiB for every number that it meets, and
# would keep a thousand of them.
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, *range(24, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64))


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
        products = [self._product(rows_N_I) for rows_N_I in x.reshape(-1, self.in_features).split(_ROWS[-1])]
        result_N_O = products[0] if len(products) == 1 else torch.cat(products)
        return result_N_O.view(*x.shape[:-1], self.out_features)

    def _product(self, rows_N_I: Tensor) -> Tensor:
        rows = len(rows_N_I)
        padding = _ROWS[bisect_left(_ROWS, rows)] - rows
        if padding:
            rows_N_I = F.pad(rows_N_I, (0, 0, 0, padding))
        result_N_O: Tensor = torch.ops.mkldnn._linear_pointwise(rows_N_I, self._packed, self.bias, "none", [], "")
        return result_N_O[:rows]


def pack_linear_layers(module: nn.Module) -> None:
    """Put packed layers in the place of a module's linear ones, as far as that can be done."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            # No subclass, which may hold its weights in other ways.
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
