"""Number formats of representations on the wire and on disk: floats, or int8 with a scale for every row."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.integrity import require_finite
from protocol.messages import DTYPES
from protocol.types import WireDtype

_INT8_MAX = 127


def quantize(rows_N_D: Tensor, dtype: WireDtype, what: str) -> tuple[Tensor, Tensor | None]:
    """Convert rows to a number format.

    Args:
        rows_N_D: rows of any float dtype.
        dtype: dtype of the result. With int8 a row is round(127 · row / max |row|), and max |row| / 127 is its scale.
        what: name of the rows for errors.

    Returns:
        Values [N, D] in that dtype, and float32 scales [N] (None unless int8).

    Raises:
        NumericalFault: a value is not finite in that dtype.
    """
    if dtype != "int8":
        converted_N_D = rows_N_D.to(DTYPES[dtype])
        require_finite(converted_N_D, what)
        return converted_N_D, None
    require_finite(rows_N_D, what)
    rows_N_D = rows_N_D.float()
    # A row of zeros may have any scale.
    scale_N = rows_N_D.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * _INT8_MAX) / _INT8_MAX
    return (rows_N_D / scale_N[:, None]).round().to(torch.int8), scale_N


def dequantize(values_N_D: Tensor, scale_N: Tensor | None) -> Tensor:
    """Rows [N, D] behind quantized values: float32 from int8, else the values unchanged."""
    return values_N_D if scale_N is None else values_N_D.float() * scale_N[:, None]
