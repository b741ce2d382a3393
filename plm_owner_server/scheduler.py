"""What the engine does next: batches of all clients in turn, each client its fair share.

A request comes as batches that were planned for it. The engine takes one at a time, of the client that was given least
so far (in tokens, as a fair queue counts virtual time); small ones of several clients go together. Drafting goes step
by step, so that nobody waits for another's last token.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from plm_owner_server.batching import fits_together
from plm_owner_server.engines.base import Draft, Encoded, Engine
from protocol.errors import Overloaded, PemaError

# A step costs about as much as so many tokens, however few sequences take part: it reads all the weights.
_STEP_TOKENS = 16
# Drafting of so many batches at once. Each holds the attention states of its sequences.
_MOST_DRAFTING = 4
# The thread ends after so many idle seconds; the next request starts another one.
_LINGER_S = 5.0
_RETRY_AFTER_S = (1.0, 60.0)


class Departed(PemaError):
    """The client has gone: nobody will read the answer."""


@dataclass(eq=False)
class Spent:
    """Seconds that a call has waited for the engine, and had it."""

    queue_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Caller:
    """Who asks, as far as scheduling is concerned.

    Attributes:
        client: the same for all requests of a client; shares are between these.
        departed: set when the client has gone, so that its work is skipped.
        spent: what the call has cost so far; the scheduler adds to it.
    """

    client: str = "local"
    departed: threading.Event = field(default_factory=threading.Event)
    spent: Spent = field(default_factory=Spent)


@dataclass(eq=False)
class Work:
    """One batch of one request.

    Attributes:
        token_ids: its sequences.
        from_position: first position wanted of each.
        with_logsumexp: encode: also the log-sum-exp.
        look_ahead: the most tokens to draft after each sequence; None to encode.
        stop_token_ids: draft: after which a sequence ends.
    """

    token_ids: list[list[int]]
    from_position: list[int]
    with_logsumexp: bool = False
    look_ahead: list[int] | None = None
    stop_token_ids: frozenset[int] = frozenset()

    @property
    def kind(self) -> tuple[object, ...]:
        """Only work of one kind goes together."""
        if self.look_ahead is None:
            return ("encode", self.with_logsumexp)
        return ("draft", self.stop_token_ids, max(self.look_ahead).bit_length())

    @property
    def tokens(self) -> int:
        """Tokens that the engine may have to run, padding and drafts included."""
        return len(self.token_ids) * (max(map(len, self.token_ids)) + max(self.look_ahead or [0]))


class _Ticket:
    """A request that waits for its batches."""

    def __init__(self, caller: Caller, works: Sequence[Work]) -> None:
        self.caller = caller
        self.waiting = deque(enumerate(works))
        self.results: list[Encoded | None] = [None] * len(works)
        self.left = len(works)
        self.compute_s = 0.0
        self.error: Exception | None = None
        self.done = threading.Event()

    def finish(self, index: int, result: Encoded) -> None:
        self.results[index] = result
        self.left -= 1
        if self.left == 0:
            self.done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.waiting.clear()
        self.done.set()


@dataclass(eq=False)
class _Part:
    """A request's batch within what the engine runs."""

    ticket: _Ticket
    index: int
    work: Work


@dataclass(eq=False)
class _Drafting:
    parts: list[_Part]
    draft: Draft


class Scheduler:
    """Shares one engine between clients; thread-safe.

    Args:
        engine: called from one thread at a time.
        batch_tokens: tokens in one forward pass.
        padding_tokens: padding in one forward pass.
        max_waiting_tokens: tokens of all requests that wait or run; more are turned away.
        max_waiting_requests: requests that wait or run, likewise.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_tokens: int,
        padding_tokens: int,
        max_waiting_tokens: int,
        max_waiting_requests: int,
    ) -> None:
        self._engine = engine
        self._batch_tokens = batch_tokens
        self._padding_tokens = padding_tokens
        self._max_tokens = max_waiting_tokens
        self._max_requests = max_waiting_requests
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # The rest is guarded by `_changed`, but for `_drafting`, which is the thread's own.
        self._queues: dict[str, deque[_Ticket]] = {}
        self._given: dict[str, float] = {}  # tokens given to each client that is here
        self._tokens: dict[str, int] = {}  # tokens of each client's requests that wait or run
        self._requests = 0
        self._rate = 0.0  # tokens per second, smoothed
        self._drafting: list[_Drafting] = []

    def run(self, caller: Caller, works: Sequence[Work]) -> list[Encoded]:
        """The results of all batches of a request, in their order; waits for them.

        Raises:
            Overloaded: too much waits already.
            Departed: the client went meanwhile.
        """
        tokens = sum(work.tokens for work in works)
        ticket = _Ticket(caller, works)
        self._admit(ticket, tokens)
        admitted = time.perf_counter()
        try:
            ticket.done.wait()
        finally:
            caller.spent.compute_s += ticket.compute_s
            caller.spent.queue_s += max(0.0, time.perf_counter() - admitted - ticket.compute_s)
            with self._changed:
                self._requests -= 1
                self._tokens[caller.client] -= tokens
                if not self._tokens[caller.client]:
                    del self._tokens[caller.client], self._given[caller.client]
        if ticket.error is not None:
            raise ticket.error
        return [result for result in ticket.results if result is not None]

    def _admit(self, ticket: _Ticket, tokens: int) -> None:
        client = ticket.caller.client
        with self._changed:
            own, total = self._tokens.get(client, 0), sum(self._tokens.values())
            # What is alone is let in, however large: the limits of a single request are the model card's. And nobody
            # may fill more than half of the places, or there would be none for the next one.
            too_much = (total and total + tokens > self._max_tokens) or (own and own + tokens > self._max_tokens // 2)
            if too_much or self._requests >= self._max_requests:
                raise Overloaded(
                    f"{self._requests} requests with {total} tokens wait already.",
                    hint="Come back later, or send fewer requests at once.",
                    retry_after_s=self._until_free(tokens),
                )
            self._requests += 1
            self._tokens[client] = own + tokens
            # Who was away has saved up nothing.
            self._given[client] = max(self._given.get(client, 0.0), min(self._given.values(), default=0.0))
            self._queues.setdefault(client, deque()).append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _until_free(self, tokens: int) -> float:
        shortest, longest = _RETRY_AFTER_S
        return min(longest, max(shortest, tokens / self._rate if self._rate else shortest))

    def _work(self) -> None:
        try:
            self._take_turns()
        except Exception as error:  # a mistake in this very module: nobody must wait for ever
            with self._changed:
                self._thread = None
                for ticket in [ticket for queue in self._queues.values() for ticket in queue]:
                    ticket.fail(error)
                self._queues.clear()
            for running in self._drafting:
                _fail(running.parts, error)
            self._drafting.clear()
            raise

    def _take_turns(self) -> None:
        while True:
            with self._changed:
                while not self._queues and not self._drafting:
                    if not self._changed.wait(_LINGER_S) and not self._queues:
                        self._thread = None
                        return
                parts = self._next_parts()
            if parts is not None:
                self._start(parts)
            elif self._drafting:
                self._step(self._next_drafting())

    def _next_parts(self) -> list[_Part] | None:
        """The next batch to start; none if some drafting should go on first."""
        drafting = [part.ticket.caller.client for running in self._drafting for part in running.parts]
        for client in sorted(self._queues, key=self._given_to):
            if any(self._given_to(other) <= self._given_to(client) for other in drafting):
                return None
            first = self._peek(client)
            if first is not None and (first.work.look_ahead is None or len(self._drafting) < _MOST_DRAFTING):
                first.ticket.waiting.popleft()
                return self._with_others(first)
        return None

    def _given_to(self, client: str) -> float:
        return self._given.get(client, 0.0)

    def _peek(self, client: str) -> _Part | None:
        """A client's next batch whose reader still waits for it."""
        queue = self._queues[client]
        while queue:
            ticket = queue[0]
            if ticket.waiting and ticket.caller.departed.is_set():
                ticket.fail(Departed("The client has gone."))
            if ticket.waiting:
                return _Part(ticket, *ticket.waiting[0])
            queue.popleft()
        del self._queues[client]
        return None

    def _with_others(self, first: _Part) -> list[_Part]:
        """Fill a batch up with other clients' small ones. A client alone is always computed in the same way."""
        parts = [first]
        for client in sorted(self._queues, key=self._given_to):
            other = None if client == first.ticket.caller.client else self._peek(client)
            if other is not None and self._go_together(_joined(parts), other.work):
                other.ticket.waiting.popleft()
                parts.append(other)
        return parts

    def _go_together(self, ours: Work, theirs: Work) -> bool:
        if ours.kind != theirs.kind:
            return False
        lengths = [len(ids) for ids in (*ours.token_ids, *theirs.token_ids)]
        drafted = max((*(ours.look_ahead or []), *(theirs.look_ahead or [])), default=0)
        window = self._engine.info.attention_window if drafted else None
        return fits_together(lengths, drafted, self._batch_tokens, self._padding_tokens, window)

    def _next_drafting(self) -> _Drafting:
        with self._changed:
            return min(self._drafting, key=lambda d: min(self._given_to(p.ticket.caller.client) for p in d.parts))

    def _start(self, parts: list[_Part]) -> None:
        work = _joined(parts)
        result: Encoded | None = None
        with self._charged(parts, sum(part.work.tokens for part in parts)):
            if work.look_ahead is None:
                result = self._engine.encode(work.token_ids, work.from_position, with_logsumexp=work.with_logsumexp)
            else:
                draft = self._engine.draft(work.token_ids, work.from_position, work.look_ahead, work.stop_token_ids)
                self._drafting.append(_Drafting(parts, draft))
        if result is not None:
            _hand_out(parts, result)

    def _step(self, running: _Drafting) -> None:
        if all(part.ticket.caller.departed.is_set() for part in running.parts):
            self._drafting.remove(running)
            _fail(running.parts, Departed("The client has gone."))
            return
        result: Encoded | None = None
        goes_on = False
        with self._charged(running.parts, max(_STEP_TOKENS, running.draft.sequences)):
            goes_on = running.draft.step()
            if not goes_on:
                result = running.draft.result()
        if not goes_on:
            self._drafting.remove(running)
        if result is not None:
            _hand_out(running.parts, result)

    @contextmanager
    def _charged(self, parts: list[_Part], tokens: int) -> Iterator[None]:
        """The engine works for some requests: put it down to their clients, and an error to all who wait for it."""
        started = time.perf_counter()
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            error = caught
        seconds = time.perf_counter() - started
        with self._changed:
            for part in parts:
                part.ticket.compute_s += seconds
                client = part.ticket.caller.client
                if client in self._given:
                    self._given[client] += tokens / len(parts)
            rate = tokens / max(seconds, 1e-9)
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        if error is not None:
            _fail(parts, error)


def _joined(parts: list[_Part]) -> Work:
    first = parts[0].work
    if len(parts) == 1:
        return first
    return Work(
        token_ids=[ids for part in parts for ids in part.work.token_ids],
        from_position=[start for part in parts for start in part.work.from_position],
        with_logsumexp=first.with_logsumexp,
        look_ahead=None if first.look_ahead is None else [k for part in parts for k in part.work.look_ahead or []],
        stop_token_ids=first.stop_token_ids,
    )


def _hand_out(parts: list[_Part], result: Encoded) -> None:
    counts = [len(part.work.token_ids) for part in parts]
    for part, own in zip(parts, result.split(counts), strict=True):
        part.ticket.finish(part.index, own)


def _fail(parts: list[_Part], error: Exception) -> None:
    for part in parts:
        # Each its own: transports note the request's id on it.
        part.ticket.fail(copy.copy(error))
