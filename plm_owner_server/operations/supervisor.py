"""The model's life: it is loaded, looked after, and loaded again when its engine breaks, until that does not help."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import NotReady, PemaError

log = logging.getLogger(__name__)

# Before each attempt to load the model again, in seconds.
_PAUSES_S = (0.0, 5.0, 30.0)
# An engine that has worked for so long gets all the attempts again.
_WELL_S = 600.0
_LOOK_EVERY_S = 1.0


class EngineStuck(PemaError):
    """The engine does not come back from its work; only the end of the process ends it."""


class Supervisor:
    """Keeps a service in its state for as long as that can be done.

    Args:
        load: loads the model and warms it up.
        state: has the service while it works, and none while it does not.
        engine_timeout_s: longest single piece of the engine's work.
        give_up: told in the end why there is no service any more.
        pauses_s: before each attempt to load the model again.

    Attributes:
        loading: whether the model is being loaded at the moment.
    """

    def __init__(
        self,
        load: Callable[[], PlmService],
        state: ServingState,
        *,
        engine_timeout_s: float,
        give_up: Callable[[PemaError], None],
        pauses_s: Sequence[float] = _PAUSES_S,
    ) -> None:
        self._load = load
        self._state = state
        self._engine_timeout_s = engine_timeout_s
        self._give_up = give_up
        self._pauses_s = pauses_s
        self._stopped = threading.Event()
        self.loading = False

    def run(self) -> None:
        """Load the model and look after it, in a thread of its own, until it is beyond help."""
        pauses: deque[float] | None = None  # there is no second attempt at what has never worked
        while True:
            failure, worked_s = self._serve()
            if failure is None:
                return
            if worked_s and (pauses is None or worked_s >= _WELL_S):
                pauses = deque(self._pauses_s)
            if isinstance(failure, EngineStuck) or not pauses:
                break
            pause_s = pauses.popleft()
            log.error("the model is loaded again in %g s; attempts left after that: %d", pause_s, len(pauses))
            _release_memory()
            if self._stopped.wait(pause_s):
                return
        self._give_up(failure)

    def stop(self) -> None:
        """Look after it no more: the process is about to end, and the engine with it."""
        self._stopped.set()

    def _serve(self) -> tuple[PemaError | None, float]:
        """Why there is no service any more, unless it was stopped, and for how many seconds there was one."""
        self.loading = True
        try:
            service = self._load()
        except PemaError as error:
            return error, 0.0
        except Exception as error:
            log.debug("traceback", exc_info=True)
            return PemaError(f"The model could not be loaded: {type(error).__name__}: {error}"), 0.0
        finally:
            self.loading = False
        began = time.monotonic()
        self._state.service = service
        try:
            failure = self._look_after(service)
        finally:
            # Whoever drops it last ends its engine, and waits: when the process ends, that is for the main thread.
            if not self._stopped.is_set():
                self._state.service = None
        return failure, time.monotonic() - began

    def _look_after(self, service: PlmService) -> PemaError | None:
        """What has become of the engine at last; nothing if nobody wants to know any more."""
        while not service.scheduler.broken.wait(min(_LOOK_EVERY_S, self._engine_timeout_s / 4)):
            is_alive = service.engine.is_alive()
            if self._stopped.is_set():
                return None
            if not is_alive:
                log.error("the engine has died")
                service.scheduler.close(NotReady("The model broke.", hint="Try again in a moment.", retry_after_s=5.0))
                break
            service.engine.evict_idle()
            if service.scheduler.busy_s > self._engine_timeout_s:
                service.scheduler.close(NotReady("The model hangs.", hint="Try again in a moment.", retry_after_s=5.0))
                return EngineStuck(
                    f"The engine has not come back for {self._engine_timeout_s:g} s.",
                    hint="If it only takes so long, give --engine-timeout.",
                )
        return PemaError("The engine breaks again and again.", hint="Look at the log, and at the device it runs on.")


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
