"""Weights in the layout that oneDNN multiplies by fastest, for models in float32 on a CPU.

torch leaves these products to MKL, which rearranges the weights in every call. With the few rows of a decoding step,
that takes longer than the product. Packed once, the product is two to four times as fast (`benchmarks.packing`).
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Number of rows that the layout is chosen for; other numbers are nearly as fast.
_USUAL_ROWS = 32
# Inputs are padded to one of these numbers of rows. oneDNN compiles a kernel of about a MiB for every number of rows,
# and caches up to a thousand of them.
_ROW_COUNTS = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    *range(24, 65, 8),
    *range(80, 129, 16),
    *range(160, 257, 32),
    *range(320, 513, 64),
)


def can_pack(weight: Tensor) -> bool:
    """Return whether torch can pack this matrix on this machine."""
    # Private operators, but the ones that torch's own compiler uses for linear layers on a CPU.
    has_operators = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and has_operators
    )


class PackedLinear(nn.Module):
    """A linear layer, x Wᵀ + b, with packed weights.

    Args:
        weight: W [out, in], float32 on the CPU; copied into the packed layout.
        bias: b [out]; None for no bias.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _USUAL_ROWS)

    @property
    def weight(self) -> Tensor:
        """W, unpacked on every access: a few architectures read it."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        products = [self._product(rows_N_I) for rows_N_I in x.reshape(-1, self.in_features).split(_ROW_COUNTS[-1])]
        result_N_O = products[0] if len(products) == 1 else torch.cat(products)
        return result_N_O.view(*x.shape[:-1], self.out_features)

    def _product(self, rows_N_I: Tensor) -> Tensor:
        rows = len(rows_N_I)
        padding = _ROW_COUNTS[bisect_left(_ROW_COUNTS, rows)] - rows
        if padding:
            rows_N_I = F.pad(rows_N_I, (0, 0, 0, padding))
        result_N_O: Tensor = torch.ops.mkldnn._linear_pointwise(rows_N_I, self._packed, self.bias, "none", [], "")
        return result_N_O[:rows]


def pack_linear_layers(module: nn.Module) -> None:
    """Replace a module's linear layers by packed ones where torch can pack them."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            # Not subclasses, which may hold their weights differently.
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
