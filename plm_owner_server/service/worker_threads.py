"""Numbers of cores for torch: all for the model's thread, one for each worker thread of the transports."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from anyio import CapacityLimiter, to_thread

_Result = TypeVar("_Result")
_thread = threading.local()


def set_torch_threads(cores: int) -> None:
    """Let torch use this many cores in the calling thread, without changing other threads."""
    torch.get_num_threads()  # its first call in a thread may adopt the number that another thread has set
    torch.set_num_threads(cores)


async def run_in_worker(work: Callable[[], _Result], limiter: CapacityLimiter) -> _Result:
    """Run `work` in a worker thread and return its result."""
    return await to_thread.run_sync(_on_one_core, work, limiter=limiter)


def _on_one_core(work: Callable[[], _Result]) -> _Result:
    # Every thread that lets torch use several cores gets a team of OpenMP threads. With more teams than cores, OpenMP
    # puts threads to sleep after each operation, and the model's own steps take half as long again.
    if not getattr(_thread, "is_set", False):
        set_torch_threads(1)
        _thread.is_set = True
    return work()
