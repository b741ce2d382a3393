"""What the engine does next: batches of all clients in turn, each client its fair share.

A request comes as batches that were planned for it. The engine takes one at a time, of the client that was given least
so far (in tokens, as a fair queue counts virtual time); small ones of several clients go together. Sequences to draft
on join those that are being drafted at the next step, and leave when they are done: nobody waits for another's last
token.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from plm_owner_server.engines.batching import plan_batches
from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch, Encoded, Engine
from plm_owner_server.service.requests import (
    CallContext,
    ClientDisconnected,
    EngineBatch,
    QueuedRequest,
    QueueLoad,
    ScheduledBatch,
    fail_all,
    merge_encode_batches,
    padded_tokens,
)
from protocol.errors import NotReady, Overloaded, PemaError

log = logging.getLogger(__name__)

# A step costs about as much as so many tokens, however few sequences take part: it reads all the weights.
_STEP_TOKENS = 16
# The thread ends after so many idle seconds; the next request starts another one.
_LINGER_S = 5.0
_RETRY_AFTER_S = (1.0, 60.0)
_RELOADED_AFTER_S = 5.0


class Scheduler:
    """Shares one engine between clients; thread-safe.

    Args:
        engine: called from one thread at a time.
        begin_thread: called first in the thread that calls the engine.
        batch_tokens: tokens in one forward pass.
        padding_tokens: padding in one forward pass.
        drafting_tokens: tokens whose attention states all that is drafted may come to hold.
        max_waiting_tokens: tokens of all requests that wait or run; more are turned away.
        max_waiting_requests: requests that wait or run, likewise. One client may have half of either.

    Attributes:
        broken: set once the engine works no more; all requests end with `NotReady` from then on.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        begin_thread: Callable[[], None] = lambda: None,
        batch_tokens: int,
        padding_tokens: int,
        drafting_tokens: int,
        max_waiting_tokens: int,
        max_waiting_requests: int,
    ) -> None:
        self._engine = engine
        self._begin_thread = begin_thread
        self._batch_tokens = batch_tokens
        self._padding_tokens = padding_tokens
        self._drafting_tokens = drafting_tokens
        self._max_tokens = max_waiting_tokens
        self._max_requests = max_waiting_requests
        self.broken = threading.Event()
        self._engine_since: float | None = None  # time of the engine's present call
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # The thread's own: what is being drafted.
        self._drafting = engine.drafting(batch_tokens)
        self._drafted: dict[DraftBatch, ScheduledBatch] = {}
        # The rest is guarded by `_changed`.
        self._queues: dict[str, deque[QueuedRequest]] = {}
        self._given: dict[str, float] = {}  # tokens given to each client that is here
        self._tokens: dict[str, int] = {}  # tokens of each client's requests that wait or run
        self._tickets: set[QueuedRequest] = set()  # all that wait or run
        self._closed: PemaError | None = None
        self._rate = 0.0  # tokens per second, smoothed

    def run(self, caller: CallContext, works: Sequence[EngineBatch]) -> list[Encoded]:
        """The results of all batches of a request, in their order; waits for them.

        Raises:
            Overloaded: too much waits already.
            Departed: the client went meanwhile.
            NotReady: the engine is broken, or `close` said so.
        """
        tokens = sum(work.tokens for work in works)
        caller.spent.tokens += sum(len(ids) for work in works for ids in work.token_ids)
        ticket = QueuedRequest(caller, works)
        self._admit(ticket, tokens)
        admitted = time.perf_counter()
        try:
            ticket.done.wait()
        finally:
            caller.spent.compute_s += ticket.compute_s
            caller.spent.queue_s += max(0.0, time.perf_counter() - admitted - ticket.compute_s)
            with self._changed:
                self._tickets.remove(ticket)
                self._tokens[caller.client] -= tokens
                if not self._tokens[caller.client]:
                    del self._tokens[caller.client]
                    # Who comes back soon is not forgiven what it was given; the others have caught up.
                    least = min((self._given[client] for client in self._tokens), default=math.inf)
                    self._given = {c: given for c, given in self._given.items() if c in self._tokens or given > least}
        if ticket.error is not None:
            raise ticket.error
        results = [result for result in ticket.results if result is not None]
        caller.spent.rows += sum(sum(result.rows) for result in results)
        return results

    def load(self) -> QueueLoad:
        """How much there is to do at the moment."""
        with self._changed:
            waiting = [ticket for queue in self._queues.values() for ticket in queue if not ticket.begun]
            tokens = sum(work.tokens for ticket in waiting for _, work in ticket.waiting)
            running = len(self._tickets) - len(waiting), sum(self._tokens.values()) - tokens
            return QueueLoad(len(waiting), running[0], tokens, running[1])

    @property
    def busy_s(self) -> float:
        """Seconds that the engine's present call has taken so far; 0 if there is none."""
        since = self._engine_since
        return 0.0 if since is None else time.perf_counter() - since

    def close(self, error: PemaError) -> None:
        """End all that waits or runs with an error, and turn away with it whatever comes."""
        with self._changed:
            self._closed = error
            for ticket in self._tickets:
                ticket.fail(copy.copy(error))
            self._changed.notify()

    def _admit(self, ticket: QueuedRequest, tokens: int) -> None:
        client = ticket.caller.client
        with self._changed:
            if self._closed is not None:
                raise copy.copy(self._closed)
            own, total = self._tokens.get(client, 0), sum(self._tokens.values())
            own_requests = sum(other.caller.client == client for other in self._tickets)
            # What is alone is let in, however large: the limits of a single request are the model card's. And nobody
            # may fill more than half of the places, or there would be none for the next one.
            too_much = (total and total + tokens > self._max_tokens) or (own and own + tokens > self._max_tokens // 2)
            too_many = own_requests >= max(1, self._max_requests // 2) or len(self._tickets) >= self._max_requests
            if too_much or too_many:
                raise Overloaded(
                    f"{len(self._tickets)} requests with {total} tokens wait already.",
                    hint="Come back later, or send fewer requests at once.",
                    retry_after_s=self._until_free(tokens),
                )
            self._tickets.add(ticket)
            self._tokens[client] = own + tokens
            # Who was away has saved up nothing.
            least = min((self._given[other] for other in self._tokens if other in self._given), default=0.0)
            self._given[client] = max(self._given.get(client, 0.0), least)
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
            self._begin_thread()
            self._take_turns()
        except Exception as error:  # a mistake in this very module: nobody must wait for ever
            with self._changed:
                self._thread = None
                for ticket in [ticket for queue in self._queues.values() for ticket in queue]:
                    ticket.fail(error)
                self._queues.clear()
                self._give_up_drafting(list(self._drafted.values()), error)
            raise

    def _take_turns(self) -> None:
        while True:
            with self._changed:
                while not self._queues and not self._drafted and self._closed is None:
                    if not self._changed.wait(_LINGER_S) and not self._queues:
                        self._thread = None
                        return
                if self._closed is not None:
                    return
                heads = [part for client in sorted(self._queues, key=self._given_to) for part in self._heads(client)]
                encoding = self._next_to_encode(heads)
                joining = [] if encoding else self._next_to_draft(heads)
            if encoding:
                self._encode(encoding)
            elif joining or self._drafted:
                self._draft(joining)

    def _given_to(self, client: str) -> float:
        return self._given.get(client, 0.0)

    def _heads(self, client: str) -> list[ScheduledBatch]:
        """The next batch of each of a client's requests, as far as somebody still waits for it."""
        for ticket in self._queues[client]:
            if ticket.waiting and ticket.caller.departed.is_set():
                ticket.fail(ClientDisconnected("The client has gone."))
        queue = deque(ticket for ticket in self._queues[client] if ticket.waiting)
        if queue:
            self._queues[client] = queue
        else:
            del self._queues[client]
        return [ScheduledBatch(ticket, *ticket.waiting[0]) for ticket in queue]

    def _next_to_encode(self, heads: Sequence[ScheduledBatch]) -> list[ScheduledBatch]:
        """The next batch to encode, unless it is the turn of those who draft; filled up with others' small ones.

        A client's own are never put together: a memory is computed in the same way whenever it is built alone.
        """
        drafting = {part.client for part in self._drafted.values()}
        drafting |= {part.client for part in heads if self._may_join(part, [])}
        parts: list[ScheduledBatch] = []
        batch: EncodeBatch | None = None
        for part in heads:
            if not isinstance(part.work, EncodeBatch) or part.client in {other.client for other in parts}:
                continue
            before = drafting - {part.client}
            if batch is None and any(self._given_to(client) <= self._given_to(part.client) for client in before):
                return []
            if batch is None or self._go_together(batch, part.work):
                part.ticket.waiting.popleft()
                parts.append(part)
                batch = merge_encode_batches(parts)
        return parts

    def _go_together(self, ours: EncodeBatch, theirs: EncodeBatch) -> bool:
        if (ours.with_logsumexp, ours.tenant) != (theirs.with_logsumexp, theirs.tenant):
            return False
        lengths = [len(ids) for ids in (*ours.token_ids, *theirs.token_ids)]
        return len(plan_batches(lengths, self._batch_tokens, self._padding_tokens)) == 1

    def _next_to_draft(self, heads: Sequence[ScheduledBatch]) -> list[ScheduledBatch]:
        """What joins those that are being drafted: as much as there is room for."""
        joining: list[ScheduledBatch] = []
        for part in heads:
            if self._may_join(part, joining):
                part.ticket.waiting.popleft()
                joining.append(part)
            elif isinstance(part.work, DraftBatch) and not self._exceeds_its_half(part, joining):
                break  # or small ones could take its room again and again
        return joining

    def _may_join(self, part: ScheduledBatch, joining: Sequence[ScheduledBatch]) -> bool:
        if not isinstance(part.work, DraftBatch):
            return False
        there = [*self._drafted.values(), *joining]
        fits = not there or padded_tokens([*there, part]) <= self._drafting_tokens
        return fits and not self._exceeds_its_half(part, joining)

    def _exceeds_its_half(self, part: ScheduledBatch, joining: Sequence[ScheduledBatch]) -> bool:
        """Whether a client would have more than half of the room for drafts."""
        own = [other for other in (*self._drafted.values(), *joining) if other.client == part.client]
        return bool(own) and padded_tokens([*own, part]) > self._drafting_tokens // 2

    def _encode(self, parts: list[ScheduledBatch]) -> None:
        batch, results = merge_encode_batches(parts), list[Encoded]()
        with self._charged(parts) as spend:
            results = self._engine.encode(batch).split([len(part.work.token_ids) for part in parts])
            spend(batch.tokens, parts)
        for part, result in zip(parts, results, strict=False):  # none after an error
            part.ticket.finish(part.index, result)

    def _draft(self, joining: list[ScheduledBatch]) -> None:
        """One step of all that is being drafted, and of what joins it."""
        self._let_go_of_departed()
        if not joining and not self._drafted:
            return
        batches = {part.work: part for part in joining if isinstance(part.work, DraftBatch)}
        self._drafted |= batches
        if batches:
            with self._charged(joining) as spend:
                spend(self._drafting.join(list(batches)), joining)
        parts, done = list(self._drafted.values()), list[tuple[DraftBatch, Decoded]]()
        if not parts:
            return
        with self._charged(parts) as spend:
            done = self._drafting.step()
            spend(max(_STEP_TOKENS, sum(len(part.work.token_ids) for part in parts)), parts)
        for batch, result in done:
            part = self._drafted.pop(batch)
            part.ticket.finish(part.index, result)

    def _let_go_of_departed(self) -> None:
        for batch, part in list(self._drafted.items()):
            if part.ticket.caller.departed.is_set():
                self._drafting.leave(batch)
                del self._drafted[batch]
                fail_all([part], ClientDisconnected("The client has gone."))

    def _give_up_drafting(self, failed: Sequence[ScheduledBatch], error: Exception) -> None:
        """After an error nobody knows in what state the drafts are: others' requests can be made again."""
        fail_all(failed, error)
        again = Overloaded("A request beside this one failed.", hint="Make it again.", retry_after_s=_RETRY_AFTER_S[0])
        fail_all([part for part in self._drafted.values() if part not in failed], again)
        self._drafted.clear()
        self._drafting = self._engine.drafting(self._batch_tokens)

    @contextmanager
    def _charged(self, parts: list[ScheduledBatch]) -> Iterator[Callable[[int, Sequence[ScheduledBatch]], None]]:
        """The engine works for some requests; an error reaches all who wait for it.

        Gives what puts tokens down to the clients of some of these requests, by their number of sequences.
        """
        self._engine_since = started = time.perf_counter()
        spent: list[tuple[int, Sequence[ScheduledBatch]]] = []
        error: Exception | None = None
        try:
            yield lambda tokens, own: spent.append((tokens, own))
        except Exception as caught:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            error = caught
            if not isinstance(error, PemaError) and not self._works():
                error = NotReady("The model has failed.", hint="It is loaded again.", retry_after_s=_RELOADED_AFTER_S)
                self.close(error)
                self.broken.set()
        self._engine_since = None
        seconds = time.perf_counter() - started
        with self._changed:
            for ticket in {part.ticket for part in parts}:
                ticket.compute_s += seconds
            for tokens, own in spent:
                sequences = sum(len(part.work.token_ids) for part in own)
                for part in own:
                    if part.client in self._given:
                        self._given[part.client] += tokens * len(part.work.token_ids) / sequences
            rate = sum(tokens for tokens, _ in spent) / max(seconds, 1e-9)
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        if error is not None and any(isinstance(part.work, DraftBatch) for part in parts):
            self._give_up_drafting(parts, error)
        elif error is not None:
            fail_all(parts, error)

    def _works(self) -> bool:
        """Whether the engine that has just failed still does what it should."""
        try:
            self._engine.warm_up()
        except Exception as error:  # noqa: BLE001 - whatever it is, it does not
            log.error("the engine is broken: after a failure, its check ends in %s", type(error).__name__)
            return False
        return True
