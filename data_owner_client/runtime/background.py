"""Work in background threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

_Result = TypeVar("_Result")


def daemon_future(work: Callable[[], _Result]) -> Future[_Result]:
    """Run `work` in a daemon thread and return its future.

    The interpreter does not wait for the thread at exit. It waits for those of a `ThreadPoolExecutor`, where a call may
    take minutes and its result is no longer needed.
    """
    future = Future[_Result]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the waiting thread must see every error
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def prefetch_one(items: Iterator[_Result]) -> Iterator[_Result]:
    """Iterate over `items`, computing each in another thread while the caller uses the one before."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, items, end)
            yield cast("_Result", item)
