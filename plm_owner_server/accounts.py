"""What both transports tell of a call besides its answer: its id, its cost, and what went wrong."""

from __future__ import annotations

import logging
import time
import traceback
import uuid

from plm_owner_server.scheduler import Caller
from protocol.errors import PemaError, ServerFault
from protocol.timing import ServerTiming

log = logging.getLogger(__name__)


def answerable(error: Exception, request_id: str, call: str) -> PemaError:
    """The error that the client shall see, with the request's id; a fault of ours is logged, and told as no more."""
    if not isinstance(error, PemaError):
        # Type and place only: an exception's text may quote the data that caused it.
        log.error("%s: %s in %s", request_id, type(error).__name__, call)
        log.debug("%s: traceback\n%s", request_id, "".join(traceback.format_tb(error.__traceback__)))
        error = ServerFault("The server failed.", hint="Report the request id to its owner; trying again may help.")
    error.request_id = request_id
    return error


def request_id_of(given: str) -> str:
    """The client's own id for a request if it is fit for a log, else a new one."""
    return given if given.isascii() and 0 < len(given) <= 64 and given.isprintable() else uuid.uuid4().hex


def timing_of(caller: Caller, started: float) -> ServerTiming:
    """Where the time of a call went that started at `started` (`time.perf_counter`) and is over now."""
    queue_s, compute_s = caller.spent.queue_s, caller.spent.compute_s
    rest_s = max(0.0, time.perf_counter() - started - queue_s - compute_s)
    return ServerTiming(queue_ms=1000 * queue_s, compute_ms=1000 * compute_s, serialise_ms=1000 * rest_s)
