"""Copying of several tensors from the device to the host at once, because every copy waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVarTuple, cast

import torch
from torch import Tensor

Tensors = TypeVarTuple("Tensors")


def to_host(*tensors: *Tensors) -> tuple[*Tensors]:
    """Move tensors to the CPU by a single copy.

    Args:
        tensors: tensors of any shapes and dtypes, or None. Those on a device must be on the same device. Tensors on the
            CPU, and None, are returned unchanged.
    """
    remote = [tensor for tensor in tensors if isinstance(tensor, Tensor) and _is_remote(tensor)]
    if not remote:
        return tensors
    copies = iter(_unpacked(_packed(remote).cpu(), remote))
    local = [next(copies) if isinstance(tensor, Tensor) and _is_remote(tensor) else tensor for tensor in tensors]
    return cast("tuple[*Tensors]", tuple(local))


def _is_remote(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors in one uint8 tensor [N] on their device."""
    bytes_N = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=tensors[0].device)
    for view, tensor in zip(_unpacked(bytes_N, tensors), tensors, strict=True):
        view.copy_(tensor)
    return bytes_N


def _unpacked(bytes_N: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the bytes with the dtypes and shapes of `like`, in its order."""
    # The largest items first: as item sizes are powers of two, every view is aligned.
    order = sorted(range(len(like)), key=lambda i: -like[i].element_size())
    parts = bytes_N.split([like[i].nbytes for i in order])
    views = {i: part.view(like[i].dtype).view(like[i].shape) for i, part in zip(order, parts, strict=True)}
    return [views[i] for i in range(len(like))]
