"""From the device to the host in one copy: every copy of its own would wait for the device once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVarTuple, cast

import torch
from torch import Tensor

Tensors = TypeVarTuple("Tensors")


def to_host(*tensors: *Tensors) -> tuple[*Tensors]:
    """The same tensors on the CPU, brought there by one copy.

    Args:
        tensors: of any shapes and dtypes. Those on a device are on the same one; those on the CPU, and None, come back
            as they are.
    """
    away = [tensor for tensor in tensors if isinstance(tensor, Tensor) and _is_away(tensor)]
    if not away:
        return tensors
    arrived = iter(_unpacked(_packed(away).cpu(), away))
    here = [next(arrived) if isinstance(tensor, Tensor) and _is_away(tensor) else tensor for tensor in tensors]
    return cast("tuple[*Tensors]", tuple(here))


def _is_away(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes [N] of all tensors, uint8, where they are."""
    bytes_N = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=tensors[0].device)
    for view, tensor in zip(_unpacked(bytes_N, tensors), tensors, strict=True):
        view.copy_(tensor)
    return bytes_N


def _unpacked(bytes_N: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the bytes, with the dtypes and shapes of `like`."""
    # The largest items first: as item sizes are powers of two, every view is aligned.
    order = sorted(range(len(like)), key=lambda i: -like[i].element_size())
    parts = bytes_N.split([like[i].nbytes for i in order])
    views = {i: part.view(like[i].dtype).view(like[i].shape) for i, part in zip(order, parts, strict=True)}
    return [views[i] for i in range(len(like))]
