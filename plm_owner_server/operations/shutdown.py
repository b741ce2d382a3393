"""How a server stops: it turns new calls away, and lets those that are worked on end."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

import uvicorn

from plm_owner_server.operations.serving_state import ServingState, shutting_down_error

log = logging.getLogger(__name__)

# For what is on its way at the end: answers, and the news that there will be none.
_LAST_WORDS_S = 1


class DrainingServer(uvicorn.Server):
    """A uvicorn that goes on listening while calls end, so that new ones are told.

    The first SIGTERM or SIGINT begins that; a second one does what it does to any process.

    Args:
        config: of the server.
        state: knows the calls, and turns new ones away.
        drain_s: longest time until they end.
    """

    def __init__(self, config: uvicorn.Config, state: ServingState, drain_s: float) -> None:
        super().__init__(config)
        self._state = state
        self._drain_s = drain_s
        self._deadline: float | None = None
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._deadline is not None or self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._state.stop()
        self._deadline = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn does ten times a second; whether it is time to go."""
        if self._deadline is not None and not self.should_exit:
            left_s = self._deadline - time.monotonic()
            if not self._told:
                self._told = True
                log.info("stopping: %d calls have %.0f s to end; new ones are refused", self._state.calls, left_s)
            if not self._state.calls or left_s <= 0:
                self._end(left_s)
        return await super().on_tick(counter)

    def _end(self, left_s: float) -> None:
        if self._state.calls:
            log.warning("%d calls have not ended in time", self._state.calls)
        if self._state.service is not None:
            self._state.service.close(shutting_down_error())
        # Until uvicorn cuts what it still sends.
        self.config.timeout_graceful_shutdown = max(_LAST_WORDS_S, int(left_s))
        self.should_exit = True
