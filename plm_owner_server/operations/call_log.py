"""What is told of a call besides its answer: its id, its cost, and what went wrong.

To its caller by the transports; to the owner's log, metrics and traces by whoever observes.
"""

from __future__ import annotations

import logging
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from plm_owner_server.service.requests import CallUsage, ClientDisconnected
from protocol.errors import PemaError, ServerFault
from protocol.timing import ServerTiming

log = logging.getLogger(__name__)

OK = "ok"
CLIENT_DISCONNECTED = "departed"
PROBE = "probe"
OTHER = "other"
Transport = Literal["rest", "grpc"]


@dataclass(eq=False)
class CallRecord:
    """A call, from its arrival until its answer is ready. Nothing in it is the client's own, but for the ids.

    Attributes:
        name: `encode` and the like, the same over both transports; `probe`, or `other` if there is no such call.
        asked: the same in the transport's own words.
        request_id: fit for a log.
        traceparent: the client's own trace, as W3C writes it; empty if it has none.
        spent: what it cost.
        outcome: `ok`, the code of the error that the client was told, or `departed` if it had gone.
        status: that in the transport's own words.
        began_ns: when it came, in nanoseconds of the clock on the wall.
        seconds: from its arrival to its answer; 0 until then.
    """

    name: str
    transport: Transport
    asked: str
    request_id: str
    traceparent: str = ""
    spent: CallUsage = field(default_factory=CallUsage)
    outcome: str = OK
    status: str = "OK"
    began_ns: int = field(default_factory=time.time_ns)
    seconds: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of waiting for the model, of its work, and of all else."""
        rest_s = max(0.0, self.seconds - self.spent.queue_s - self.spent.compute_s)
        return {"queue": self.spent.queue_s, "compute": self.spent.compute_s, "serialise": rest_s}

    def fail(self, error: Exception) -> PemaError:
        """Note that it fails; the error that the client shall see. A fault of ours is logged, and told as no more."""
        if not isinstance(error, PemaError):
            # Type and place only: an exception's text may quote the data that caused it.
            log.error("%s: %s in %s", self.request_id, type(error).__name__, self.name)
            log.debug("%s: traceback\n%s", self.request_id, "".join(traceback.format_tb(error.__traceback__)))
            error = ServerFault("The server failed.", hint="Report the request id to its owner; trying again may help.")
        self.outcome = CLIENT_DISCONNECTED if isinstance(error, ClientDisconnected) else error.code
        error.request_id = self.request_id
        return error


Observer = Callable[[CallRecord], None]


class CallRecorder:
    """Tells all observers of every call that is over; the log is the first of them.

    Attributes:
        observers: are called in the event loop's thread, so they must be quick.
    """

    def __init__(self) -> None:
        self.observers: list[Observer] = [log_call]

    @contextmanager
    def of(self, call: CallRecord) -> Iterator[CallRecord]:
        """Take the time of a call."""
        started = time.perf_counter()
        try:
            yield call
        finally:
            call.seconds = time.perf_counter() - started
            for observe in self.observers:
                observe(call)


def log_call(call: CallRecord) -> None:
    """A line in the log. Probes come every few seconds; a log of them hides everything else."""
    fields = {
        "request_id": call.request_id,
        "call": call.name,
        "transport": call.transport,
        "outcome": call.outcome,
        "status": call.status,
        "ms": round(1000 * call.seconds, 1),
    }
    text, values = "%s %s -> %s in %.0f ms", [call.request_id, call.asked, call.status, 1000 * call.seconds]
    if call.spent.tokens or call.spent.rows:
        cost = {
            "tokens_in": call.spent.tokens,
            "rows_out": call.spent.rows,
            "queue_ms": round(1000 * call.spent.queue_s, 1),
            "compute_ms": round(1000 * call.spent.compute_s, 1),
        }
        fields |= cost
        text += ": %d tokens in, %d rows out, queue %.0f ms, compute %.0f ms"
        values += cost.values()
    log.log(logging.DEBUG if call.name == PROBE else logging.INFO, text, *values, extra=fields)


def request_id_of(given: str) -> str:
    """The client's own id for a request if it is fit for a log, else a new one."""
    return given if given.isascii() and 0 < len(given) <= 64 and given.isprintable() else uuid.uuid4().hex


def timing_of(spent: CallUsage, started: float) -> ServerTiming:
    """Where the time of a call went that started at `started` (`time.perf_counter`) and is over now."""
    rest_s = max(0.0, time.perf_counter() - started - spent.queue_s - spent.compute_s)
    return ServerTiming(queue_ms=1000 * spent.queue_s, compute_ms=1000 * spent.compute_s, serialise_ms=1000 * rest_s)
