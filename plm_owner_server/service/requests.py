"""Requests on their way through the scheduler: who asks, what it costs, and how far they are."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from plm_owner_server.engines.interface import DraftBatch, EncodeBatch, Encoded
from plm_owner_server.service.disclosure import FULL_DISCLOSURE, Disclosure
from plm_owner_server.service.metering import UNMETERED, Meter
from protocol.errors import PemaError

EngineBatch = EncodeBatch | DraftBatch


class ClientDisconnected(PemaError):
    """The client has gone: nobody will read the answer."""


@dataclass(eq=False)
class CallUsage:
    """What a call has cost so far.

    Attributes:
        queue_s: seconds that it waited for the engine.
        compute_s: seconds that it had it.
        tokens: of the sequences that it sent.
        rows: of representations that it was given, or of the head.
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    tokens: int = 0
    rows: int = 0


@dataclass(frozen=True, eq=False)
class CallContext:
    """Who makes a call.

    Attributes:
        client: the same for all requests of a client; shares are between these.
        tenant: to whom the client belongs; tenants never share what is known of a text.
        disclosure: what that tenant may see of the model.
        meter: that the call is put down on.
        departed: set when the client has gone, so that its work is skipped.
        spent: what the call has cost so far; the scheduler adds to it.
    """

    client: str = "local"
    tenant: str = ""
    disclosure: Disclosure = FULL_DISCLOSURE
    meter: Meter = UNMETERED
    departed: threading.Event = field(default_factory=threading.Event)
    spent: CallUsage = field(default_factory=CallUsage)


@dataclass(frozen=True)
class QueueLoad:
    """Requests that wait for the engine, those that it has begun with, and the tokens of both."""

    waiting_requests: int
    running_requests: int
    waiting_tokens: int
    running_tokens: int


class QueuedRequest:
    """A request that waits for its batches."""

    def __init__(self, caller: CallContext, works: Sequence[EngineBatch]) -> None:
        self.caller = caller
        self.waiting = deque(enumerate(works))
        self.results: list[Encoded | None] = [None] * len(works)
        self.left = len(works)
        self.compute_s = 0.0
        self.error: Exception | None = None
        self.done = threading.Event()

    @property
    def begun(self) -> bool:
        """Whether the engine has begun with it."""
        return len(self.waiting) < len(self.results)

    def finish(self, index: int, result: Encoded) -> None:
        """Note the result of a batch."""
        self.results[index] = result
        self.left -= 1
        if self.left == 0:
            self.done.set()

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if self.done.is_set():
            return
        self.error = error
        self.waiting.clear()
        self.done.set()


@dataclass(frozen=True, eq=False)
class ScheduledBatch:
    """A request's batch within what the engine runs."""

    ticket: QueuedRequest
    index: int
    work: EngineBatch

    @property
    def client(self) -> str:
        return self.ticket.caller.client


def padded_tokens(parts: Sequence[ScheduledBatch]) -> int:
    """Tokens that batches may come to hold together: all their sequences are padded to the longest."""
    works = [part.work for part in parts if isinstance(part.work, DraftBatch)]
    return sum(len(work.token_ids) for work in works) * max(work.width for work in works)


def merge_encode_batches(parts: Sequence[ScheduledBatch]) -> EncodeBatch:
    """The batches to encode of several requests, as one."""
    works = [part.work for part in parts if isinstance(part.work, EncodeBatch)]
    return EncodeBatch(
        [ids for work in works for ids in work.token_ids],
        [start for work in works for start in work.from_position],
        works[0].with_logsumexp,
        works[0].tenant,
    )


def fail_all(parts: Sequence[ScheduledBatch], error: Exception) -> None:
    """End the requests of these parts with an error."""
    for part in parts:
        # Each its own: transports note the request's id on it.
        part.ticket.fail(copy.copy(error))
