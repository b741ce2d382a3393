"""Graceful shutdown: the server refuses new calls and lets the calls in progress end."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

import uvicorn

from plm_owner_server.operations.serving_state import ServingState, shutting_down_error

log = logging.getLogger(__name__)

# Shortest time at the end for sending answers and errors.
_FLUSH_SECONDS = 1


class DrainingServer(uvicorn.Server):
    """A uvicorn server that listens until all calls have ended, so that new calls get an error.

    The first SIGTERM or SIGINT begins the shutdown. A second one has its default effect.

    Args:
        config: uvicorn's configuration.
        state: counts the calls in progress, and refuses new ones.
        drain_s: longest time that the calls in progress get, in seconds.
    """

    def __init__(self, config: uvicorn.Config, state: ServingState, drain_s: float) -> None:
        super().__init__(config)
        self._state = state
        self._drain_s = drain_s
        self._deadline: float | None = None
        self._is_announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown at the first signal."""
        if self._deadline is not None or self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._state.stop()
        self._deadline = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        """Check the calls in progress. uvicorn calls this ten times a second; True ends the server."""
        if self._deadline is not None and not self.should_exit:
            left_s = self._deadline - time.monotonic()
            if not self._is_announced:
                self._is_announced = True
                log.info("stopping: %d calls have %.0f s to end; new ones are refused", self._state.calls, left_s)
            if not self._state.calls or left_s <= 0:
                self._end(left_s)
        return await super().on_tick(counter)

    def _end(self, left_s: float) -> None:
        if self._state.calls:
            log.warning("%d calls have not ended in time", self._state.calls)
        if self._state.service is not None:
            self._state.service.scheduler.close(shutting_down_error())
        # Time until uvicorn cuts connections that it still sends on.
        self.config.timeout_graceful_shutdown = max(_FLUSH_SECONDS, int(left_s))
        self.should_exit = True
