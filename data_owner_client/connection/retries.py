"""When to ask again, and the account of what was asked: the same for every transport."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from tenacity import RetryCallState, Retrying, stop_after_delay, wait_random_exponential

from data_owner_client.connection.base import Exchange, Observer
from protocol.errors import ConnectionFailed, NotReady, Overloaded, PemaError, ProtocolViolation
from protocol.timing import ServerTiming

log = logging.getLogger(__name__)

# Long enough for a server to be restarted with a large model, or to work off what it has.
GIVE_UP_AFTER_S = 300.0
# What goes by itself at once is not worth a line.
_TELL_FROM_ATTEMPT = 3
# Of answers that are none: something on the way garbles them, now and then or for good.
_GARBLED_ATTEMPTS = 3
_Result = TypeVar("_Result")
_back_off = wait_random_exponential(multiplier=0.25, max=10)


def answered(
    call: str,
    attempt: Callable[[str], tuple[_Result, ServerTiming | None]],
    observers: Sequence[Observer],
    *,
    give_up_after_s: float,
    unless_gone: bool = False,
) -> _Result:
    """The result of a call, which is made again when the server is overloaded, not ready or lost on the way.

    Calls are stateless, so what failed is simply asked again, with exponential back-off and full jitter or when the
    server says so.

    Args:
        call: its name, for the log.
        attempt: makes the call once, under the request id that it is given.
        observers: told of the exchange.
        give_up_after_s: time after which the last error is raised, in seconds.
        unless_gone: give up at once if nobody answers, or not in the form of the protocol.
    """
    refused = 0

    def once() -> _Result:
        nonlocal refused
        request_id, started = uuid.uuid4().hex[:16], time.perf_counter()
        try:
            result, timing = attempt(request_id)
        except PemaError as error:
            refused += isinstance(error, Overloaded)
            log.debug("%s %s failed: %s", request_id, call, error)
            raise
        exchange = Exchange(call, request_id, time.perf_counter() - started, refused, timing)
        log.debug("%s %s answered in %.0f ms", request_id, call, 1000 * exchange.seconds)
        for observer in observers:
            observer(exchange)
        return result

    def may_pass(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, ProtocolViolation):
            return not unless_gone and state.attempt_number < _GARBLED_ATTEMPTS
        return isinstance(error, (Overloaded, NotReady) if unless_gone else (ConnectionFailed, Overloaded, NotReady))

    attempts = Retrying(
        retry=may_pass, wait=_wait, stop=stop_after_delay(give_up_after_s), before_sleep=_tell, reraise=True
    )
    result: _Result = attempts(once)
    return result


def _tell(state: RetryCallState) -> None:
    if state.attempt_number >= _TELL_FROM_ATTEMPT and state.outcome is not None:
        log.warning("%s Trying again in %.0f s.", state.outcome.exception(), state.upcoming_sleep)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, PemaError) else None
    return max(_back_off(state), asked or 0.0)
