"""Calls beside the program's own work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

_Result = TypeVar("_Result")


def daemon_future(work: Callable[[], _Result]) -> Future[_Result]:
    """What `work` will give, done in a thread that the program does not wait for at its end.

    A `ThreadPoolExecutor` would: an answer may be minutes away, and nobody waits for it any more.
    """
    future = Future[_Result]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result must hear of it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def prefetch_one(items: Iterator[_Result]) -> Iterator[_Result]:
    """The same items, each of which is made, in one other thread, while the one before is used."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield cast("_Result", item)
