"""The record of a call besides its answer: its id, its usage, its outcome, and the log line about it.

The transports report it to the client; observers report it to the owner's log, metrics and traces.
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
CLIENT_DISCONNECTED = "client_disconnected"
PROBE = "probe"
OTHER = "other"
Transport = Literal["rest", "grpc"]


@dataclass(eq=False)
class CallRecord:
    """Record of a call, from its arrival until its answer is ready. Only the two ids come from the client.

    Attributes:
        name: `encode` and so on, equal over both transports; `probe`, or `other` if there is no such call.
        transport: `rest` or `grpc`.
        request_line: the call in the transport's words, such as `POST /v1/encode`.
        request_id: id of the request, fit for a log.
        traceparent: the client's trace in W3C's form; empty if it has none.
        usage: resources that the call has used.
        outcome: `ok`, the code of the error that the client gets, or `client_disconnected`.
        status: the outcome in the transport's words.
        began_ns: wall-clock time of its arrival, in nanoseconds.
        seconds: time from its arrival to its answer; 0 until then.
    """

    name: str
    transport: Transport
    request_line: str
    request_id: str
    traceparent: str = ""
    usage: CallUsage = field(default_factory=CallUsage)
    outcome: str = OK
    status: str = "OK"
    began_ns: int = field(default_factory=time.time_ns)
    seconds: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of waiting for the model, of its work, and of everything else, by the part's name."""
        rest_s = max(0.0, self.seconds - self.usage.queue_s - self.usage.compute_s)
        return {"queue": self.usage.queue_s, "compute": self.usage.compute_s, "serialise": rest_s}

    def fail(self, error: Exception) -> PemaError:
        """Record a failure, and return the error for the client. It gets no details of a fault of the server."""
        if not isinstance(error, PemaError):
            # Without the exception's text, which may quote the data that caused it.
            log.error("%s: %s in %s", self.request_id, type(error).__name__, self.name)
            log.debug("%s: traceback\n%s", self.request_id, "".join(traceback.format_tb(error.__traceback__)))
            error = ServerFault("The server failed.", hint="Report the request id to its owner; trying again may help.")
        self.outcome = CLIENT_DISCONNECTED if isinstance(error, ClientDisconnected) else error.code
        error.request_id = self.request_id
        return error


Observer = Callable[[CallRecord], None]


class CallRecorder:
    """Reports every call that is over to all observers, the log first.

    Attributes:
        observers: called in the event loop's thread, so they must be quick.
    """

    def __init__(self) -> None:
        self.observers: list[Observer] = [log_call]

    @contextmanager
    def record(self, call: CallRecord) -> Iterator[CallRecord]:
        """Measure a call, and report it at its end."""
        started = time.perf_counter()
        try:
            yield call
        finally:
            call.seconds = time.perf_counter() - started
            for observe in self.observers:
                observe(call)


def log_call(call: CallRecord) -> None:
    """Log a call. Probes come every few seconds, so they are logged at level debug."""
    fields = {
        "request_id": call.request_id,
        "call": call.name,
        "transport": call.transport,
        "outcome": call.outcome,
        "status": call.status,
        "ms": round(1000 * call.seconds, 1),
    }
    text, values = "%s %s -> %s in %.0f ms", [call.request_id, call.request_line, call.status, 1000 * call.seconds]
    if call.usage.tokens or call.usage.rows:
        cost = {
            "tokens_in": call.usage.tokens,
            "rows_out": call.usage.rows,
            "queue_ms": round(1000 * call.usage.queue_s, 1),
            "compute_ms": round(1000 * call.usage.compute_s, 1),
        }
        fields |= cost
        text += ": %d tokens in, %d rows out, queue %.0f ms, compute %.0f ms"
        values += cost.values()
    log.log(logging.DEBUG if call.name == PROBE else logging.INFO, text, *values, extra=fields)


def request_id_of(client_id: str) -> str:
    """The client's id for a request if it is fit for a log, else a new id."""
    is_fit = client_id.isascii() and 0 < len(client_id) <= 64 and client_id.isprintable()
    return client_id if is_fit else uuid.uuid4().hex


def timing_of(usage: CallUsage, started: float) -> ServerTiming:
    """Server timing of a call that started at `started` (`time.perf_counter`) and is over now."""
    rest_s = max(0.0, time.perf_counter() - started - usage.queue_s - usage.compute_s)
    return ServerTiming(queue_ms=1000 * usage.queue_s, compute_ms=1000 * usage.compute_s, serialise_ms=1000 * rest_s)
