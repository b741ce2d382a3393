"""When to ask again, and the account of what was asked: the same for every transport."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, wait_random_exponential
from tenacity.nap import sleep_using_event

from data_owner_client.plm.connection.base import Attempt, Observer
from protocol.errors import ConnectionFailed, MalformedMessage, NotReady, Overloaded, PemaError, ProtocolViolation
from protocol.timing import ServerTiming

log = logging.getLogger(__name__)

# Long enough for a server to be restarted with a large model, or to work off what it has.
RETRY_FOR_SECONDS = 300.0
# What goes by itself at once is not worth a line.
_TELL_FROM_FAILURE = 3
# Nor is a short wait; of a long one, such as for a quota, who waits should know.
_TELL_FROM_WAIT_S = 15.0
# Something on the way garbles requests or answers, now and then or for good.
_MOST_GARBLED = 3
_Result = TypeVar("_Result")
_back_off = wait_random_exponential(multiplier=0.25, max=10)


class Retrier:
    """Makes calls until they are answered; thread-safe.

    Calls are stateless, so what the server was too busy for, or what was lost or garbled on the way, is simply asked
    again: with exponential back-off and full jitter, not before the server says, until it has failed for too long.

    Args:
        give_up_after_s: longest time from the first failure of a call to its last attempt, in seconds.
    """

    def __init__(self, give_up_after_s: float) -> None:
        self.observers: list[Observer] = []
        self._give_up_after_s = give_up_after_s
        self._closed = threading.Event()

    def close(self) -> None:
        """Make no further attempt, also of calls that are waiting for theirs."""
        self._closed.set()

    def call(
        self,
        call: str,
        attempt: Callable[[str], tuple[_Result, ServerTiming | None]],
        *,
        fail_fast: bool = False,
    ) -> _Result:
        """The result of a call.

        Args:
            call: its name, for the log.
            attempt: makes the call once, under the request id that it is given.
            fail_fast: give up at once if nobody answers, or not in the form of the protocol.

        Raises:
            PemaError: of the last attempt.
        """
        patience = _RetryPolicy(self._give_up_after_s, self._closed, fail_fast=fail_fast)
        attempts = Retrying(
            retry=patience.may_pass,
            wait=patience.wait,
            stop=patience.at_end,
            sleep=sleep_using_event(self._closed),
            before_sleep=_tell,
            reraise=True,
        )
        result: _Result = attempts(self._once, call, attempt)
        return result

    def _once(self, call: str, attempt: Callable[[str], tuple[_Result, ServerTiming | None]]) -> _Result:
        request_id, started = uuid.uuid4().hex[:16], time.perf_counter()
        try:
            result, timing = attempt(request_id)
        except PemaError as error:
            log.debug("%s %s failed: %s", request_id, call, error)
            if isinstance(error, Overloaded):
                self._tell_observers(Attempt(call, request_id, time.perf_counter() - started, refused=True))
            raise
        exchange = Attempt(call, request_id, time.perf_counter() - started, timing=timing)
        log.debug("%s %s answered in %.0f ms", request_id, call, 1000 * exchange.seconds)
        self._tell_observers(exchange)
        return result

    def _tell_observers(self, exchange: Attempt) -> None:
        for observer in list(self.observers):
            observer(exchange)


class _RetryPolicy:
    """How long one call is made again."""

    def __init__(self, give_up_after_s: float, closed: threading.Event, *, fail_fast: bool) -> None:
        self._give_up_after_s = give_up_after_s
        self._closed = closed
        self._unless_gone = fail_fast
        self._ends: float | None = None  # known from the first failure on
        self._garbled = 0

    def may_pass(self, state: RetryCallState) -> bool:
        """Whether another attempt may go better."""
        error = _error(state)
        if self._ends is None:
            self._ends = time.monotonic() + self._give_up_after_s
        # A request of ours that the server calls malformed was garbled on its way.
        if isinstance(error, (ProtocolViolation, MalformedMessage)):
            self._garbled += 1
            return not self._unless_gone and self._garbled < _MOST_GARBLED
        if isinstance(error, ConnectionFailed):
            return not self._unless_gone
        return isinstance(error, (Overloaded, NotReady))

    def wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: those who were refused together shall not come back together."""
        error = _error(state)
        asked = error.retry_after_s if isinstance(error, PemaError) else None
        return _back_off(state) + (asked or 0.0)

    def at_end(self, state: RetryCallState) -> bool:
        """Whether there is no time for another attempt."""
        return self._closed.is_set() or time.monotonic() + state.upcoming_sleep > (self._ends or 0.0)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _tell(state: RetryCallState) -> None:
    if state.attempt_number >= _TELL_FROM_FAILURE or state.upcoming_sleep >= _TELL_FROM_WAIT_S:
        log.warning("%s Trying again in %.0f s.", _error(state), state.upcoming_sleep)
