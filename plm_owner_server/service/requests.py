"""Requests on their way through the scheduler: the call's context, its usage, and its progress."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from plm_owner_server.engines.interface import DraftBatch, EncodeBatch, Encoded
from plm_owner_server.service.disclosure import FULL_DISCLOSURE, Disclosure
from plm_owner_server.service.metering import UNMETERED, Meter
from protocol.errors import NotReady, PemaError

EngineBatch = EncodeBatch | DraftBatch


def engine_failed_error() -> NotReady:
    """The error of calls that the engine did not finish, or that arrive after it has failed."""
    return NotReady("The model has failed.", hint="Try again in a moment: the server restarts.", retry_after_s=5.0)


class ClientDisconnected(PemaError):
    """The client has disconnected: there is no reader for the answer."""


@dataclass(eq=False)
class CallUsage:
    """Resources that a call has used so far.

    Attributes:
        queue_s: seconds spent waiting for the engine.
        compute_s: seconds of the engine's work.
        tokens: tokens of the sequences in the request.
        rows: rows of representations, or of the LM head, in the answer.
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    tokens: int = 0
    rows: int = 0


@dataclass(eq=False)
class CallContext:
    """Context of one call. The transport makes it; admission adds the tenant.

    Attributes:
        client: key of the client's fair share: the tenant's name or, on a server without tenants, the client's own
            name or address.
        tenant: name of the tenant, "" without tenants. Cached states of texts are never shared between tenants.
        disclosure: parts of the model that the tenant may see.
        scopes: calls that the tenant may make; empty without tenants, as all may be made.
        meter: charges the call to the tenant's quotas.
        disconnected: set once the client has disconnected, so that its work is skipped.
        usage: resources used so far; the service and the scheduler add to them.
    """

    client: str = "local"
    tenant: str = ""
    disclosure: Disclosure = FULL_DISCLOSURE
    scopes: frozenset[str] = frozenset()
    meter: Meter = UNMETERED
    disconnected: threading.Event = field(default_factory=threading.Event)
    usage: CallUsage = field(default_factory=CallUsage)


@dataclass(frozen=True)
class QueueLoad:
    """Requests that wait for the engine, requests that it has begun, and the tokens of both."""

    waiting_requests: int
    running_requests: int
    waiting_tokens: int
    running_tokens: int


class QueuedRequest:
    """A request and the results of its batches.

    Args:
        context: the call's context.
        batches: the request, as batches for the engine.

    Attributes:
        waiting: index and batch of everything that the engine has not begun.
        results: result of each batch; None until it is there.
        compute_s: seconds of the engine's work so far.
        error: reason that the request failed, if it did.
        done: set once all results are there, or `error` is.
    """

    def __init__(self, context: CallContext, batches: Sequence[EngineBatch]) -> None:
        self.context = context
        self.waiting = deque(enumerate(batches))
        self.results: list[Encoded | None] = [None] * len(batches)
        self._unfinished = len(batches)
        self.compute_s = 0.0
        self.error: Exception | None = None
        self.done = threading.Event()

    @property
    def begun(self) -> bool:
        """True once the engine has begun with a batch."""
        return len(self.waiting) < len(self.results)

    def finish(self, index: int, result: Encoded) -> None:
        """Record the result of a batch."""
        self.results[index] = result
        self._unfinished -= 1
        if self._unfinished == 0:
            self.done.set()

    def fail(self, error: Exception) -> None:
        """End the request with an error, unless it has ended."""
        if self.done.is_set():
            return
        self.error = error
        self.waiting.clear()
        self.done.set()


@dataclass(frozen=True, eq=False)
class ScheduledBatch:
    """A batch with the request that it belongs to, and its index there."""

    request: QueuedRequest
    index: int
    batch: EngineBatch

    @property
    def client(self) -> str:
        """Key of the client's fair share."""
        return self.request.context.client


def padded_tokens(scheduled: Sequence[ScheduledBatch]) -> int:
    """Bound on the tokens of batches that are drafted together: all sequences are padded to the longest."""
    batches = [entry.batch for entry in scheduled if isinstance(entry.batch, DraftBatch)]
    return sum(len(batch.token_ids) for batch in batches) * max(batch.width for batch in batches)


def merge_encode_batches(scheduled: Sequence[ScheduledBatch]) -> EncodeBatch:
    """One batch with the sequences of several requests' batches."""
    batches = [entry.batch for entry in scheduled if isinstance(entry.batch, EncodeBatch)]
    return EncodeBatch(
        [ids for batch in batches for ids in batch.token_ids],
        [start for batch in batches for start in batch.from_position],
        batches[0].with_logsumexp,
        batches[0].tenant,
    )


def fail_all(scheduled: Sequence[ScheduledBatch], error: Exception) -> None:
    """End the requests of these batches with copies of an error."""
    for entry in scheduled:
        # A copy each: transports write the request's id into it.
        entry.request.fail(copy.copy(error))
