"""How many cores torch uses in which thread: the model's thread has them, the transports' have one each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from anyio import CapacityLimiter, to_thread

_Result = TypeVar("_Result")
_thread = threading.local()


def set_torch_threads(cores: int) -> None:
    """Let torch use so many cores in this thread, and change nothing for the others."""
    torch.get_num_threads()  # which may still take the process's number over, and that may be another thread's
    torch.set_num_threads(cores)


async def run_in_worker(work: Callable[[], _Result], limiter: CapacityLimiter) -> _Result:
    """The result of `work`, done in a thread of the transports'."""
    return await to_thread.run_sync(_on_one_core, work, limiter=limiter)


def _on_one_core(work: Callable[[], _Result]) -> _Result:
    # Every thread that lets torch use several cores gets a team of helpers. More teams than cores make OpenMP put
    # helpers to sleep after each operation: then the model's own steps take half as long again.
    if not getattr(_thread, "is_set", False):
        set_torch_threads(1)
        _thread.is_set = True
    return work()
