"""The threads in which transports run calls: with little work of their own, and none of the model's cores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from anyio import CapacityLimiter, to_thread

_Result = TypeVar("_Result")
_thread = threading.local()


async def in_worker(work: Callable[[], _Result], limiter: CapacityLimiter) -> _Result:
    """The result of `work`, done in a thread."""
    return await to_thread.run_sync(_alone, work, limiter=limiter)


def _alone(work: Callable[[], _Result]) -> _Result:
    # Every thread that lets torch use several cores gets a team of helpers. More teams than cores make OpenMP put
    # helpers to sleep after each operation: then the model's own steps take half as long again.
    if not getattr(_thread, "is_set", False):
        torch.get_num_threads()  # which may still take the process's number over
        torch.set_num_threads(1)
        _thread.is_set = True
    return work()
