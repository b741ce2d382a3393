"""Calls ahead of their use: as many in flight as keep the server busy, in the order of the items."""

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
# A request that waited for less than this share of its computing time found the server idle.
_IDLE_BELOW = 0.1
# A request that waited for more than this multiple of its computing time was sent too early.
_CROWDED_ABOVE = 2.0


class InFlightWindow:
    """Number of calls in flight, adapted to the timing in the server's answers; thread-safe.

    With two calls, one computes while the next one waits, and the server is never idle. An answer that found the server
    idle enlarges the window, because the network is slow. An answer that waited for long makes it smaller, because
    other clients use the server, too. A refusal halves the window. Further refusals do not, until there is an answer.

    Args:
        start: initial size, in calls.
        usual: size without a reason for another one. Only refusals make the window smaller; answers enlarge it again.
        largest: upper bound of the size. Every call in flight holds an answer in memory.

    Attributes:
        size: current size, in calls.
        largest: upper bound of the size, in calls.
    """

    def __init__(self, *, start: int = 2, usual: int = 2, largest: int = 16) -> None:
        self.size = start
        self.largest = largest
        self._usual = usual
        self._refused = False
        self._lock = threading.Lock()

    def observe(self, attempt: Attempt) -> None:
        """Adapt the size to one answer or refusal."""
        with self._lock:
            if attempt.refused:
                if not self._refused:
                    self.size = max(1, self.size // 2)
                self._refused = True
                return
            self._refused = False
            timing = attempt.timing
            if self.size < self._usual or (timing and timing.queue_ms < _IDLE_BELOW * timing.compute_ms):
                self.size = min(self.largest, self.size + 1)
            elif timing and timing.queue_ms > _CROWDED_ABOVE * timing.compute_ms:
                self.size = max(self._usual, self.size - 1)


def ordered_map(call: Callable[[_In], _Out], items: Iterable[_In], window: InFlightWindow) -> Iterator[_Out]:
    """Iterate over the results of `call`, in the order of the items. Up to `window.size` calls run in threads."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        waiting.append(daemon_future(partial(call, item)))
        while len(waiting) >= window.size:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
