"""When to ask again: the same rule for every transport."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from protocol.errors import ConnectionFailed, NotReady, Overloaded, PemaError

log = logging.getLogger(__name__)

# Long enough for a server to be restarted with a large model, or to work off what it has.
_GIVE_UP_AFTER_S = 300.0
# What goes by itself at once is not worth a line.
_TELL_FROM_ATTEMPT = 3
_Result = TypeVar("_Result")


def with_retries(call: Callable[[], _Result], *, unless_gone: bool = False) -> _Result:
    """The result of a call, which is made again when the server is overloaded, not ready or lost on the way.

    Calls are stateless, so what failed is simply asked again, with exponential back-off and full jitter or when the
    server says so, for five minutes.

    Args:
        call: one attempt.
        unless_gone: give up at once if nobody answers.
    """
    passing = (Overloaded, NotReady) if unless_gone else (ConnectionFailed, Overloaded, NotReady)
    attempts = Retrying(
        retry=retry_if_exception_type(passing),
        wait=_wait,
        stop=stop_after_delay(_GIVE_UP_AFTER_S),
        before_sleep=_tell,
        reraise=True,
    )
    result: _Result = attempts(call)
    return result


_back_off = wait_random_exponential(multiplier=0.25, max=10)


def _tell(state: RetryCallState) -> None:
    if state.attempt_number >= _TELL_FROM_ATTEMPT and state.outcome is not None:
        log.warning("%s Trying again in %.0f s.", state.outcome.exception(), state.upcoming_sleep)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, PemaError) else None
    return max(_back_off(state), asked or 0.0)
