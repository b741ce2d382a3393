"""Calls that run ahead of whoever uses their results: as many as keep the server busy, and no more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from data_owner_client.plm.connection.base import Attempt
from data_owner_client.runtime.background import daemon_future

_In = TypeVar("_In")
_Out = TypeVar("_Out")
# A request that waited for less than this part of its own computing time found the server idle before it.
_IDLE_BELOW = 0.1
# And one that waited for more than this multiple of it was sent too early.
_CROWDED_ABOVE = 2.0


class InFlightWindow:
    """How many calls are in flight, adapted to what the server says of each.

    One computes while the next one waits: then the server never waits for us. If an answer shows that the server was
    idle before it, the network is slow and more must be on their way; if it waited for long, others use the server,
    too, and more would only fill its queue. Refusals halve the window, once for all that come without an answer between
    them. Thread-safe.

    Args:
        start: size to begin with.
        usual: size without any reason for another one; only refusals lead below it, and answers back.
        largest: every call in flight holds an answer in memory.
    """

    def __init__(self, *, start: int = 2, usual: int = 2, largest: int = 16) -> None:
        self.size = start
        self.largest = largest
        self._usual = usual
        self._refused = False
        self._lock = threading.Lock()

    def learn(self, exchange: Attempt) -> None:
        """Adapt to one answer."""
        with self._lock:
            if exchange.refused:
                if not self._refused:
                    self.size = max(1, self.size // 2)
                self._refused = True
                return
            self._refused = False
            timing = exchange.timing
            if self.size < self._usual or (timing and timing.queue_ms < _IDLE_BELOW * timing.compute_ms):
                self.size = min(self.largest, self.size + 1)
            elif timing and timing.queue_ms > _CROWDED_ABOVE * timing.compute_ms:
                self.size = max(self._usual, self.size - 1)


def ordered_map(call: Callable[[_In], _Out], items: Iterable[_In], window: InFlightWindow) -> Iterator[_Out]:
    """Results in the order of the items, while further calls run in threads."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        waiting.append(daemon_future(partial(call, item)))
        while len(waiting) >= window.size:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
