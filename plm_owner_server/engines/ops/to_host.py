"""Copying of several tensors from the device to the host at once, beside whatever the host does next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVarTuple, cast

import torch
from torch import Tensor

Tensors = TypeVarTuple("Tensors")


class HostCopy(Generic[*Tensors]):
    """A single copy of several tensors to the CPU, which begins at once.

    From CUDA it goes into pinned memory, and neither the host nor the passes that follow wait for it. Copies of one
    stream arrive in the order in which they began, so that waiting for the newest first is waiting once.

    Args:
        tensors: tensors of any shapes and dtypes, or None. Those on a device must be on the same device. Tensors on the
            CPU, and None, stay as they are.
    """

    def __init__(self, *tensors: *Tensors) -> None:
        self._tensors = tensors
        self._remote = [tensor for tensor in tensors if isinstance(tensor, Tensor) and _is_remote(tensor)]
        self._arrived: torch.cuda.Event | None = None
        if not self._remote:
            return
        bytes_N = _packed(self._remote)
        if bytes_N.device.type != "cuda":
            self._bytes_N = bytes_N.cpu()
            return
        # A copy into memory that is not pinned waits for the device.
        self._bytes_N = torch.empty(bytes_N.shape, dtype=torch.uint8, pin_memory=True)
        self._bytes_N.copy_(bytes_N, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(bytes_N.device))

    def wait(self) -> tuple[*Tensors]:
        """The tensors on the CPU, once they have arrived."""
        if not self._remote:
            return self._tensors
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()
        copies = iter(_unpacked(self._bytes_N, self._remote))
        local = [
            next(copies) if isinstance(tensor, Tensor) and _is_remote(tensor) else tensor for tensor in self._tensors
        ]
        return cast("tuple[*Tensors]", tuple(local))


def to_host(*tensors: *Tensors) -> tuple[*Tensors]:
    """Move tensors to the CPU by a single copy, and wait for it; see `HostCopy`."""
    return HostCopy(*tensors).wait()


def _is_remote(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors in one uint8 tensor [N] on their device."""
    if len(tensors) == 1:
        return tensors[0].contiguous().flatten().view(torch.uint8)
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
