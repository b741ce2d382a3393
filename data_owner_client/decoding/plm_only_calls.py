"""Calls in which the server finishes sequences alone."""

from __future__ import annotations

import time
from concurrent import futures
from concurrent.futures import Future
from functools import partial

from data_owner_client.decoding.round_call import RoundResponse, call_server
from data_owner_client.decoding.sequence import SequenceState
from data_owner_client.decoding.speculative import SpeculativeDecoder
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.background import daemon_future

# Calls in flight at the same time.
_MAX_PLM_ONLY_CALLS = 4


class PlmOnlyCalls:
    """Calls in which the server finishes sequences alone, where λ is 0 to the end, beside the rounds of the others.

    Args:
        plm: the PLM.
        decoder: accepts the responses.
        batch_size: sequences in flight.

    Attributes:
        calls: calls in flight, with the number of sequences in each.
    """

    def __init__(self, plm: RemotePlm, decoder: SpeculativeDecoder, batch_size: int) -> None:
        self._plm = plm
        self._decoder = decoder
        self._batch_size = batch_size
        self.calls: dict[Future[RoundResponse], int] = {}

    def begin(self, waiting: list[SequenceState]) -> None:
        """Start a call for some of these sequences and remove them from the list, if there is room."""
        room = self._batch_size - sum(self.calls.values())
        if not waiting or room <= 0 or len(self.calls) >= _MAX_PLM_ONLY_CALLS:
            return
        batch, waiting[:] = waiting[:room], waiting[room:]
        look_ahead = [self._decoder.max_look_ahead(s) for s in batch]
        call = daemon_future(partial(call_server, self._plm, batch, look_ahead=look_ahead))
        self.calls[call] = len(batch)

    def completed(self, *, wait: bool) -> list[SequenceState]:
        """Accept the responses that have arrived and return their sequences.

        Args:
            wait: wait until one call is answered.
        """
        started = time.perf_counter()
        done = futures.wait(self.calls, None if wait else 0, futures.FIRST_COMPLETED).done
        self._decoder.stats.server_s += time.perf_counter() - started
        self.calls = {call: size for call, size in self.calls.items() if call not in done}
        answers = [call.result() for call in done]
        for answer in answers:
            self._decoder.accept(answer)
        return [sequence for answer in answers for sequence in answer.batch]
