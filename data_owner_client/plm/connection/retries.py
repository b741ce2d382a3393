"""Retries of failed calls and the record of each attempt, for every transport."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, wait_random_exponential
from tenacity.nap import sleep_using_event

from data_owner_client.plm.connection.base import Attempt, Observer
from data_owner_client.plm.connection.settings import ConnectionSettings
from protocol.errors import (
    AnswerLost,
    ConnectionFailed,
    GatewayFailed,
    GatewayTimeout,
    InvalidRequest,
    MalformedMessage,
    NotReady,
    Overloaded,
    PemaError,
    ProtocolViolation,
    RequestTimeout,
    TimedOut,
)
from protocol.timing import ServerTiming

log = logging.getLogger(__name__)

# Warn from this failure of a call on: earlier ones often pass at once.
_WARN_FROM_FAILURE = 3
# Warn before any wait of this length, such as one for a quota.
_WARN_FROM_WAIT_SECONDS = 15.0
# Attempts that may fail because a request or an answer was garbled on the way.
_MAX_GARBLED = 3
# Attempts of a call that fails fast, where a gateway answers in the server's place.
_MAX_GATEWAY_FAILURES = 3
# A divisible request counts as too large after this many attempts without an answer, over at least so many seconds.
# Restarts and faults of the network pass sooner. A repeated request has the same answer to the last bit; one that is
# divided need not.
_MAX_LOST = 4
_MIN_LOST_SECONDS = 30.0
# Longest wait for the answer to a call that fails fast, which needs no computing: proxies and firewalls may hang.
_FIRST_ANSWER_SECONDS = 60.0
_Result = TypeVar("_Result")
_AttemptOnce = Callable[[str, float], tuple[_Result, ServerTiming | None]]
_back_off = wait_random_exponential(multiplier=0.25, max=10)


class Retrier:
    """Repeats calls until the server answers; thread-safe.

    Calls are stateless. A call is repeated if the server was overloaded, or if the request or the answer was lost or
    garbled. The waits grow exponentially with full jitter, and are no shorter than the server asks for.

    Args:
        settings: time-out and retries.

    Attributes:
        observers: functions that receive every attempt that was answered, refused or timed out.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.observers: list[Observer] = []
        self._settings = settings
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop all retries, including those of calls that are waiting for their next attempt."""
        self._closed.set()

    def call(
        self,
        name: str,
        attempt: _AttemptOnce[_Result],
        *,
        fail_fast: bool = False,
        divisible: bool = False,
    ) -> _Result:
        """Make a call, and repeat it until it succeeds.

        Args:
            name: name of the call, for the log.
            attempt: makes the call once, with a request id and a time-out in seconds, which are its arguments. Returns
                the result and the server's timing, or None if the server sent none.
            fail_fast: give up at once if the server does not answer, or answers in another form than the protocol's.
                The time-out is at most a minute.
            divisible: give up at a gateway's time-out, and after some attempts without an answer: the caller sends
                smaller requests.

        Raises:
            InvalidRequest: the connection is closed.
            PemaError: the error of the last attempt.
        """
        if self._closed.is_set():
            raise InvalidRequest("The connection is closed.", hint="Connect again.")
        timeout_s = self._settings.timeout
        if fail_fast:
            timeout_s = min(timeout_s, _FIRST_ANSWER_SECONDS)
        policy = _RetryPolicy(self._settings.retry_for, self._closed, fail_fast=fail_fast, divisible=divisible)
        attempts = Retrying(
            retry=policy.should_retry,
            wait=policy.wait,
            stop=policy.time_is_up,
            sleep=sleep_using_event(self._closed),
            before_sleep=_warn,
            reraise=True,
        )
        result: _Result = attempts(self._once, name, attempt, timeout_s)
        return result

    def _once(self, name: str, attempt: _AttemptOnce[_Result], timeout_s: float) -> _Result:
        request_id, started = uuid.uuid4().hex[:16], time.perf_counter()
        try:
            result, timing = attempt(request_id, timeout_s)
        except PemaError as error:
            log.debug("%s %s failed: %s", request_id, name, error)
            if isinstance(error, (Overloaded, TimedOut)):
                self._notify(Attempt(name, request_id, time.perf_counter() - started, refused=True))
            raise
        record = Attempt(name, request_id, time.perf_counter() - started, timing=timing)
        log.debug("%s %s answered in %.0f ms", request_id, name, 1000 * record.seconds)
        self._notify(record)
        return result

    def _notify(self, record: Attempt) -> None:
        for observer in list(self.observers):
            observer(record)


class _RetryPolicy:
    """Decides whether and when one call is repeated."""

    def __init__(self, retry_for: float, closed: threading.Event, *, fail_fast: bool, divisible: bool) -> None:
        self._retry_for = retry_for
        self._closed = closed
        self._fail_fast = fail_fast
        self._divisible = divisible
        self._first_failure: float | None = None
        self._failures = Counter[str]()

    def should_retry(self, state: RetryCallState) -> bool:
        """Return True if another attempt may succeed."""
        if self._first_failure is None:
            self._first_failure = time.monotonic()
        match _error(state):
            # If the server calls our request malformed, the request was garbled on the way.
            case ProtocolViolation() | MalformedMessage():
                return not self._fail_fast and self._count("garbled") < _MAX_GARBLED
            case GatewayTimeout() | RequestTimeout() if self._divisible:
                return False
            case TimedOut() | AnswerLost() if self._divisible:
                patience_s = min(_MIN_LOST_SECONDS, self._retry_for / 2)
                return self._count("lost") < _MAX_LOST or time.monotonic() < self._first_failure + patience_s
            case GatewayFailed() if self._fail_fast:
                return self._count("gateway") < _MAX_GATEWAY_FAILURES
            case ConnectionFailed():
                return not self._fail_fast
            case Overloaded() | NotReady() | RequestTimeout():
                return True
        return False

    def _count(self, kind: str) -> int:
        self._failures[kind] += 1
        return self._failures[kind]

    def wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt, with jitter, so that clients refused together do not retry together."""
        error = _error(state)
        retry_after = error.retry_after_s if isinstance(error, PemaError) else None
        return _back_off(state) + (retry_after or 0.0)

    def time_is_up(self, state: RetryCallState) -> bool:
        """Return True if there is no time for another attempt."""
        ends = (self._first_failure or 0.0) + self._retry_for
        return self._closed.is_set() or time.monotonic() + state.upcoming_sleep > ends


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _warn(state: RetryCallState) -> None:
    if state.attempt_number >= _WARN_FROM_FAILURE or state.upcoming_sleep >= _WARN_FROM_WAIT_SECONDS:
        log.warning("%s Trying again in %.0f s.", _error(state), state.upcoming_sleep)
