"""The loop of rounds: sequences of all requests advance together, and join and leave at any round."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_owner_client.decoding.decode_loop import largest_batch
from data_owner_client.decoding.sequence import SequenceState
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.decoding.speculative import SpeculativeDecoder
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import ConnectionFailed, NotReady, Overloaded, PemaError, RequestTimeout, ServerFault
from protocol.rate_limits import RateLimitStatus

log = logging.getLogger(__name__)

# Seconds until the next attempt where the owner names none.
_RETRY_SECONDS = 0.5
# Seconds after which a refused request may come again, where the gateway itself is full.
_FULL_RETRY_SECONDS = 1.0
# Share of a round's time for which the next round waits for the next requests of clients whose answers have just ended.
_NEXT_REQUESTS_SHARE = 0.1
_PASSING = (Overloaded, NotReady, ConnectionFailed, RequestTimeout, ServerFault)
"""Errors of a call that may succeed when it is repeated."""

OnEnd = Callable[[PemaError | None], None]
"""Called once in the thread of the loop when a sequence has ended, or with the error that ended it."""


@dataclass(eq=False)
class Member:
    """A sequence in the loop.

    Attributes:
        sequence: the sequence.
        on_end: called when it has ended; not after it has left.
        has_left: whether nobody waits for it any more.
    """

    sequence: SequenceState
    on_end: OnEnd
    has_left: bool = False

    def leave(self) -> None:
        """Take the sequence out of the loop before the next round; any thread may do so."""
        self.has_left = True


class RoundLoop:
    """Runs rounds in a thread of its own while there are sequences.

    A round is one call to the owner for all sequences in it. Where the owner refuses a call or is away, sequences
    without a token fail at once, and their clients learn when to come back. Those under way are tried again for as long
    as patience lasts.

    Args:
        plm: the PLM, over a connection that does not repeat calls for longer than a client may wait.
        settings: look-ahead and batch size.
        max_waiting: sequences that may wait for a place in a round.
        patience_s: seconds for which sequences under way outlast an owner that refuses calls or is away.
    """

    def __init__(self, plm: RemotePlm, settings: DecodingSettings, *, max_waiting: int, patience_s: float) -> None:
        self._plm = plm
        self._decoder = SpeculativeDecoder(plm, settings)
        self._batch_size = largest_batch(plm, settings)
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting = deque[Member]()
        self._active = list[Member]()
        self._refused_until = 0.0
        self._failing_since: float | None = None
        self._closed = False
        self._just_ended = 0
        self._round_s = 0.0
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in a round."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Sequences in the current round."""
        return len(self._active)

    @property
    def quotas(self) -> tuple[RateLimitStatus, ...]:
        """The remaining quotas at the owner, as of the newest answer; empty if there are none."""
        return self._plm.rate_limits

    def require_room(self) -> None:
        """Refuse a request that would have to wait for too long.

        Raises:
            Overloaded: too many sequences wait, or the owner has named a time before which it takes no calls.
        """
        if (wait_s := self._refused_until - time.monotonic()) > 0:
            raise Overloaded("The PLM owner's server is busy.", hint="Try again later.", retry_after_s=wait_s)
        if self.waiting >= self._max_waiting:
            raise Overloaded(
                f"{self.waiting} answers wait already.",
                hint="Try again later, or raise --max-waiting.",
                retry_after_s=_FULL_RETRY_SECONDS,
            )

    def join(self, sequences: Sequence[SequenceState], on_end: Sequence[OnEnd]) -> list[Member]:
        """Add the sequences of a request.

        Args:
            sequences: sequences before their first tokens.
            on_end: for each, called when it has ended.

        Raises:
            Overloaded: see `require_room`.
            NotReady: the loop is closed.
        """
        members = [Member(sequence, called) for sequence, called in zip(sequences, on_end, strict=True)]
        with self._changed:
            if self._closed:
                raise NotReady("The gateway is stopping.", hint="Try again when it is back.", retry_after_s=1.0)
            self.require_room()
            self._waiting.extend(members)
            self._changed.notify()
        return members

    def close(self) -> None:
        """End the loop after the current round; sequences that have not ended fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._fill():
            self._round()
        self._fail(self._active + list(self._waiting), NotReady("The gateway has stopped.", hint="Try again later."))
        self._active, self._waiting = [], deque()

    def _fill(self) -> bool:
        """Wait for sequences, and give them the free places; return False when the loop is closed."""
        with self._changed:
            self._wait_for_next_requests()
            while not self._closed:
                self._active = [member for member in self._active if not member.has_left]
                while self._waiting and len(self._active) < self._batch_size:
                    member = self._waiting.popleft()
                    if not member.has_left:
                        self._active.append(member)
                if self._active:
                    return True
                self._changed.wait()
        return False

    def _wait_for_next_requests(self) -> None:
        """Give clients whose answers ended in the last round the time to ask again.

        A client that asks one question after the other would miss each next round otherwise.
        """
        expected = min(self._just_ended, self._batch_size - len(self._active)) if self._active else 0
        self._just_ended = 0
        self._changed.wait_for(
            lambda: self._closed or len(self._waiting) >= expected, _NEXT_REQUESTS_SHARE * self._round_s
        )

    def _round(self) -> None:
        started = time.monotonic()
        try:
            self._step(self._active)
        except _PASSING as error:
            self._wait_for_owner(error)
        except PemaError:
            self._step_apart()
        else:
            self._failing_since = None
        ended = [member for member in self._active if member.sequence.end]
        self._active = [member for member in self._active if not member.sequence.end]
        self._just_ended, self._round_s = len(ended), time.monotonic() - started
        for member in ended:
            _call(member, None)

    def _step(self, members: Sequence[Member]) -> None:
        """Extend sequences by one call.

        Raises:
            PemaError: the call has failed.
        """
        try:
            self._decoder.step([member.sequence for member in members])
        except PemaError:
            raise
        except Exception as error:
            log.error("a round has failed: %s", type(error).__name__)  # its message may hold text
            log.debug("traceback", exc_info=True)
            self._fail(members, ServerFault("The gateway has failed.", hint="Its log has the kind of the error."))

    def _step_apart(self) -> None:
        """Make a call for each sequence alone, so that one which cannot go on does not end the others."""
        for member in list(self._active):
            try:
                self._step([member])
            except _PASSING as error:
                self._wait_for_owner(error)
                return
            except PemaError as error:
                self._fail([member], error)

    def _wait_for_owner(self, error: PemaError) -> None:
        """End the sequences that cannot wait, and wait until the owner may take a call."""
        now, wait_s = time.monotonic(), error.retry_after_s or _RETRY_SECONDS
        self._failing_since = self._failing_since or now
        out_of_patience = now + wait_s > self._failing_since + self._patience_s
        self._fail([m for m in self._active if out_of_patience or not m.sequence.length], error)
        if isinstance(error, Overloaded):
            self._refused_until = now + wait_s
        if not self._active:
            self._failing_since = None
            return
        log.warning("%s %d answers wait for %.1f s.", error, len(self._active), wait_s)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or all(m.has_left for m in self._active), wait_s)

    def _fail(self, members: Sequence[Member], error: PemaError) -> None:
        """End sequences with an error."""
        failed = set(members)
        self._active = [member for member in self._active if member not in failed]
        for member in members:
            _call(member, error)


def _call(member: Member, error: PemaError | None) -> None:
    if not member.has_left:
        member.on_end(error)
