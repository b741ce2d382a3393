"""Scheduling of the engine: batches of all clients take turns, with a fair share for each client.

Every request is planned as batches. The engine takes one batch at a time, of the client that has used least so far (in
tokens, as a fair queue counts virtual time). Small encode batches of several clients go together. Sequences to draft
join the running ones at the next step, and leave when they are complete.
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
    engine_failed_error,
    fail_all,
    merge_encode_batches,
    padded_tokens,
)
from plm_owner_server.service.unbatching import unbatch
from protocol.errors import Overloaded, PemaError

log = logging.getLogger(__name__)

# Smallest cost of a decoding step, in tokens: it reads all the weights, however few sequences take part.
_STEP_TOKENS = 16
# The thread ends after this idle time; the next request starts another one.
_LINGER_SECONDS = 5.0
_RETRY_AFTER_SECONDS = (1.0, 60.0)


class Scheduler:
    """Shares one engine between clients. Thread-safe.

    Args:
        engine: called from one thread at a time.
        begin_thread: called first in the thread that calls the engine.
        batch_tokens: largest number of tokens in one forward pass.
        padding_tokens: largest number of padding tokens in one forward pass.
        drafting_tokens: bound on the tokens whose attention states all drafted sequences hold together.
        max_waiting_tokens: largest number of tokens of all requests that wait or run. One client may have half.
        max_waiting_requests: largest number of requests that wait or run. One client may have half.

    Attributes:
        broken: set once the engine has failed for good; all requests end with `NotReady` from then on.
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
        self._engine_since: float | None = None  # begin of the engine's present call
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        # Of the scheduler's thread alone: the sequences that are being drafted.
        self._drafting = engine.drafting(batch_tokens)
        self._drafted: dict[DraftBatch, ScheduledBatch] = {}
        # All that follows is guarded by `_changed`.
        self._queues: dict[str, deque[QueuedRequest]] = {}
        self._virtual_time: dict[str, float] = {}  # tokens that each present client has used
        self._tokens: dict[str, int] = {}  # tokens of each client's requests that wait or run
        self._requests: set[QueuedRequest] = set()  # all that wait or run
        self._closed: PemaError | None = None
        self._rate = 0.0  # tokens per second, smoothed

    def encode(
        self,
        context: CallContext,
        token_ids: Sequence[list[int]],
        from_position: Sequence[int],
        *,
        with_logsumexp: bool = False,
    ) -> Encoded:
        """Representations of all positions ≥ `from_position` of every sequence. Waits for the engine.

        Args:
            context: the call's context; its usage is updated.
            token_ids: token ids of each sequence.
            from_position: first requested position of each sequence.
            with_logsumexp: whether to return the log-sum-exp.

        Raises:
            Overloaded: too much waits already.
            ClientDisconnected: the client has disconnected.
            NotReady: the engine is broken, or the scheduler was closed.
            ServerFault: the engine did not answer every position.
        """
        plan = plan_batches([len(ids) for ids in token_ids], self._batch_tokens, self._padding_tokens)
        batches = [
            EncodeBatch(
                [token_ids[i] for i in indices],
                [from_position[i] for i in indices],
                with_logsumexp,
                context.tenant,
            )
            for indices in plan
        ]
        return unbatch(plan, self.run(context, batches))

    def decode(
        self,
        context: CallContext,
        token_ids: Sequence[list[int]],
        from_position: Sequence[int],
        look_ahead: Sequence[int],
        stop_token_ids: frozenset[int],
    ) -> Decoded:
        """Representations of every sequence and of the tokens drafted after it. Waits for the engine.

        Args:
            context: the call's context; its usage is updated.
            token_ids: token ids of each sequence.
            from_position: first requested position of each sequence.
            look_ahead: largest number of tokens to draft after each sequence.
            stop_token_ids: tokens after which a sequence ends.

        Raises:
            Overloaded, ClientDisconnected, NotReady, ServerFault: see `encode`.
        """
        # No client may take all the room. Padding costs next to nothing: a step runs one token of each sequence.
        room = self._drafting_tokens // 2
        plan = plan_batches([len(ids) for ids in token_ids], room, math.inf, drafted=max(look_ahead))
        batches = [
            DraftBatch(
                [token_ids[i] for i in indices],
                [from_position[i] for i in indices],
                [look_ahead[i] for i in indices],
                stop_token_ids,
                context.tenant,
            )
            for indices in plan
        ]
        results = self.run(context, batches)
        return unbatch(plan, [result for result in results if isinstance(result, Decoded)])

    def run(self, context: CallContext, batches: Sequence[EngineBatch]) -> list[Encoded]:
        """Results of all batches of a request, in the order of the batches. Waits for the engine.

        Raises:
            Overloaded, ClientDisconnected, NotReady: see `encode`.
        """
        tokens = sum(batch.tokens for batch in batches)
        context.usage.tokens += sum(len(ids) for batch in batches for ids in batch.token_ids)
        request = QueuedRequest(context, batches)
        self._enqueue(request, tokens)
        enqueued = time.perf_counter()
        try:
            request.done.wait()
        finally:
            context.usage.compute_s += request.compute_s
            context.usage.queue_s += max(0.0, time.perf_counter() - enqueued - request.compute_s)
            self._remove(request, tokens)
        if request.error is not None:
            raise request.error
        results = [result for result in request.results if result is not None]
        context.usage.rows += sum(sum(result.rows) for result in results)
        return results

    def load(self) -> QueueLoad:
        """Number and size of the requests at the moment."""
        with self._changed:
            waiting = [request for queue in self._queues.values() for request in queue if not request.begun]
            tokens = sum(batch.tokens for request in waiting for _, batch in request.waiting)
            running = len(self._requests) - len(waiting), sum(self._tokens.values()) - tokens
            return QueueLoad(len(waiting), running[0], tokens, running[1])

    @property
    def busy_s(self) -> float:
        """Seconds that the engine's present call has taken so far; 0 if there is none."""
        since = self._engine_since
        return 0.0 if since is None else time.perf_counter() - since

    def close(self, error: PemaError) -> None:
        """End all requests with an error, and refuse all that follow with it."""
        with self._changed:
            self._closed = error
            for request in self._requests:
                request.fail(copy.copy(error))
            self._changed.notify()

    def _enqueue(self, request: QueuedRequest, tokens: int) -> None:
        client = request.context.client
        with self._changed:
            if self._closed is not None:
                raise copy.copy(self._closed)
            client_tokens, total = self._tokens.get(client, 0), sum(self._tokens.values())
            client_requests = sum(other.context.client == client for other in self._requests)
            # A lone request is admitted, however large: the model card limits a single request. No client may fill
            # more than half of the queue, or there would be no room for the next client.
            over_half = client_tokens and client_tokens + tokens > self._max_tokens // 2
            too_much = (total and total + tokens > self._max_tokens) or over_half
            too_many = client_requests >= max(1, self._max_requests // 2) or len(self._requests) >= self._max_requests
            if too_much or too_many:
                raise Overloaded(
                    f"{len(self._requests)} requests with {total} tokens wait already.",
                    hint="Come back later, or send fewer requests at once.",
                    retry_after_s=self._until_free(tokens),
                )
            self._requests.add(request)
            self._tokens[client] = client_tokens + tokens
            # An idle client does not accumulate credit.
            least = min((self._virtual_time[c] for c in self._tokens if c in self._virtual_time), default=0.0)
            self._virtual_time[client] = max(self._virtual_time.get(client, 0.0), least)
            self._queues.setdefault(client, deque()).append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _remove(self, request: QueuedRequest, tokens: int) -> None:
        client = request.context.client
        with self._changed:
            self._requests.remove(request)
            self._tokens[client] -= tokens
            if not self._tokens[client]:
                del self._tokens[client]
                # Keep the counters of clients that are ahead, so that leaving and returning does not reset their share.
                least = min((self._virtual_time[c] for c in self._tokens), default=math.inf)
                self._virtual_time = {c: t for c, t in self._virtual_time.items() if c in self._tokens or t > least}

    def _until_free(self, tokens: int) -> float:
        shortest, longest = _RETRY_AFTER_SECONDS
        return min(longest, max(shortest, tokens / self._rate if self._rate else shortest))

    def _work(self) -> None:
        try:
            self._begin_thread()
            self._take_turns()
        except Exception as error:  # a mistake in this module: no request may wait for ever
            with self._changed:
                self._thread = None
                for request in [request for queue in self._queues.values() for request in queue]:
                    request.fail(error)
                self._queues.clear()
                self._abandon_drafting(list(self._drafted.values()), error)
            raise

    def _take_turns(self) -> None:
        while True:
            with self._changed:
                while not self._queues and not self._drafted and self._closed is None:
                    if not self._changed.wait(_LINGER_SECONDS) and not self._queues:
                        self._thread = None
                        return
                if self._closed is not None:
                    return
                clients = sorted(self._queues, key=self._used_by)
                heads = [head for client in clients for head in self._heads(client)]
                encoding = self._next_to_encode(heads)
                joining = [] if encoding else self._next_to_draft(heads)
            if encoding:
                self._encode(encoding)
            elif joining or self._drafted:
                self._draft(joining)

    def _used_by(self, client: str) -> float:
        return self._virtual_time.get(client, 0.0)

    def _heads(self, client: str) -> list[ScheduledBatch]:
        """The next batch of each of a client's requests, without requests whose client has disconnected."""
        for request in self._queues[client]:
            if request.waiting and request.context.disconnected.is_set():
                request.fail(_disconnected())
        queue = deque(request for request in self._queues[client] if request.waiting)
        if queue:
            self._queues[client] = queue
        else:
            del self._queues[client]
        return [ScheduledBatch(request, *request.waiting[0]) for request in queue]

    def _next_to_encode(self, heads: Sequence[ScheduledBatch]) -> list[ScheduledBatch]:
        """The next batch to encode, filled up with small ones of other clients; none if clients that draft come first.

        Batches of one client are never merged: a memory that is built alone is always computed in equal batches.
        """
        drafting = {entry.client for entry in self._drafted.values()}
        drafting |= {entry.client for entry in heads if self._may_join(entry, [])}
        scheduled: list[ScheduledBatch] = []
        batch: EncodeBatch | None = None
        for entry in heads:
            if not isinstance(entry.batch, EncodeBatch) or entry.client in {other.client for other in scheduled}:
                continue
            before = drafting - {entry.client}
            if batch is None and any(self._used_by(client) <= self._used_by(entry.client) for client in before):
                return []
            if batch is None or self._go_together(batch, entry.batch):
                entry.request.waiting.popleft()
                scheduled.append(entry)
                batch = merge_encode_batches(scheduled)
        return scheduled

    def _go_together(self, first: EncodeBatch, second: EncodeBatch) -> bool:
        if (first.with_logsumexp, first.tenant) != (second.with_logsumexp, second.tenant):
            return False
        lengths = [len(ids) for ids in (*first.token_ids, *second.token_ids)]
        return len(plan_batches(lengths, self._batch_tokens, self._padding_tokens)) == 1

    def _next_to_draft(self, heads: Sequence[ScheduledBatch]) -> list[ScheduledBatch]:
        """Batches that join the drafted ones: as many as there is room for."""
        joining: list[ScheduledBatch] = []
        for entry in heads:
            if self._may_join(entry, joining):
                entry.request.waiting.popleft()
                joining.append(entry)
            elif isinstance(entry.batch, DraftBatch) and not self._exceeds_its_half(entry, joining):
                break  # smaller batches behind it could take its room again and again
        return joining

    def _may_join(self, entry: ScheduledBatch, joining: Sequence[ScheduledBatch]) -> bool:
        if not isinstance(entry.batch, DraftBatch):
            return False
        drafted = [*self._drafted.values(), *joining]
        fits = not drafted or padded_tokens([*drafted, entry]) <= self._drafting_tokens
        return fits and not self._exceeds_its_half(entry, joining)

    def _exceeds_its_half(self, entry: ScheduledBatch, joining: Sequence[ScheduledBatch]) -> bool:
        """True if a client would have more than half of the room for drafts."""
        of_client = [other for other in (*self._drafted.values(), *joining) if other.client == entry.client]
        return bool(of_client) and padded_tokens([*of_client, entry]) > self._drafting_tokens // 2

    def _encode(self, scheduled: list[ScheduledBatch]) -> None:
        batch, results = merge_encode_batches(scheduled), list[Encoded]()
        with self._charged(scheduled) as charge:
            results = self._engine.encode(batch).split([len(entry.batch.token_ids) for entry in scheduled])
            charge(batch.tokens, scheduled)
        for entry, result in zip(scheduled, results, strict=False):  # none after an error
            entry.request.finish(entry.index, result)

    def _draft(self, joining: list[ScheduledBatch]) -> None:
        """One step of all drafted batches, with the ones that join them."""
        self._drop_disconnected()
        if not joining and not self._drafted:
            return
        batches = {entry.batch: entry for entry in joining if isinstance(entry.batch, DraftBatch)}
        self._drafted |= batches
        if batches:
            with self._charged(joining) as charge:
                charge(self._drafting.join(list(batches)), joining)
        scheduled, done = list(self._drafted.values()), list[tuple[DraftBatch, Decoded]]()
        if not scheduled:
            return
        with self._charged(scheduled) as charge:
            done = self._drafting.step()
            charge(max(_STEP_TOKENS, sum(len(entry.batch.token_ids) for entry in scheduled)), scheduled)
        for batch, result in done:
            entry = self._drafted.pop(batch)
            entry.request.finish(entry.index, result)

    def _drop_disconnected(self) -> None:
        for batch, entry in list(self._drafted.items()):
            if entry.request.context.disconnected.is_set():
                self._drafting.leave(batch)
                del self._drafted[batch]
                fail_all([entry], _disconnected())

    def _abandon_drafting(self, failed: Sequence[ScheduledBatch], error: Exception) -> None:
        """End all drafting after an error, which leaves the drafts in an unknown state. Other clients can retry."""
        fail_all(failed, error)
        again = Overloaded(
            "A request beside this one failed.", hint="Make it again.", retry_after_s=_RETRY_AFTER_SECONDS[0]
        )
        fail_all([entry for entry in self._drafted.values() if entry not in failed], again)
        self._drafted.clear()
        self._drafting = self._engine.drafting(self._batch_tokens)

    @contextmanager
    def _charged(self, scheduled: list[ScheduledBatch]) -> Iterator[Callable[[int, Sequence[ScheduledBatch]], None]]:
        """Measure the engine's work for some requests, and end them with its error if it fails.

        Yields a function that charges tokens to the clients of some of these requests, by their number of sequences.
        """
        self._engine_since = started = time.perf_counter()
        charges: list[tuple[int, Sequence[ScheduledBatch]]] = []
        error: Exception | None = None
        try:
            yield lambda tokens, charged: charges.append((tokens, charged))
        except Exception as caught:  # noqa: BLE001 - whatever it is, the requests must end
            error = caught
            if not isinstance(error, PemaError) and not self._works():
                error = engine_failed_error()
                self.close(error)
                self.broken.set()
        self._engine_since = None
        seconds = time.perf_counter() - started
        with self._changed:
            for request in {entry.request for entry in scheduled}:
                request.compute_s += seconds
            for tokens, charged in charges:
                sequences = sum(len(entry.batch.token_ids) for entry in charged)
                for entry in charged:
                    if entry.client in self._virtual_time:
                        self._virtual_time[entry.client] += tokens * len(entry.batch.token_ids) / sequences
            rate = sum(tokens for tokens, _ in charges) / max(seconds, 1e-9)
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        if error is not None and any(isinstance(entry.batch, DraftBatch) for entry in scheduled):
            self._abandon_drafting(scheduled, error)
        elif error is not None:
            fail_all(scheduled, error)

    def _works(self) -> bool:
        """True if the engine, which has just failed, passes its check."""
        try:
            self._engine.warm_up()
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine does not work
            log.error("the engine is broken: after a failure, its check ends in %s", type(error).__name__)
            return False
        return True


def _disconnected() -> ClientDisconnected:
    return ClientDisconnected("The client has disconnected.")
