"""Threads for the calls of requests that take long and are not made in the loop of rounds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from protocol.errors import Overloaded

_Result = TypeVar("_Result")
_THREADS = 4
# Seconds after which a refused request may come again.
_RETRY_SECONDS = 1.0


class Workers:
    """Runs blocking calls in threads, and refuses those that would wait behind too many others.

    Args:
        max_waiting: calls that may wait for a thread.
        threads: number of threads.
    """

    def __init__(self, max_waiting: int, threads: int = _THREADS) -> None:
        self._places = threading.Semaphore(max_waiting + threads)
        self._threads = ThreadPoolExecutor(threads, "worker")

    async def run(self, call: Callable[[], _Result]) -> _Result:
        """Run a call in a thread; return its result.

        Raises:
            Overloaded: too many calls wait.
        """
        if not self._places.acquire(blocking=False):
            raise Overloaded(
                "Too many requests wait already.",
                hint="Try again later, or raise --max-waiting.",
                retry_after_s=_RETRY_SECONDS,
            )
        future = self._threads.submit(call)
        # A call that has begun goes on where nobody waits for it any more, and keeps its place.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Take no more calls, and do not wait for those under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)
