"""Supervision of the model: it is loaded, and watched until its engine fails."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable

from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import engine_failed_error
from protocol.errors import PemaError

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_START_AGAIN = "Start the server again. The log says more, as may the device it runs on."


class EngineStuck(PemaError):
    """The engine hangs in a call; only the end of the process ends the call."""


class Supervisor:
    """Loads the model, and watches its engine until it fails or the server stops.

    Args:
        load: loads the model and warms it up.
        state: gets the service once it is loaded, and loses it when its engine has failed.
        engine_timeout_s: longest single call of the engine, in seconds.
        give_up: called with the reason once there will be no service any more.

    Attributes:
        loading: True while the model loads.
    """

    def __init__(
        self,
        load: Callable[[], PlmService],
        state: ServingState,
        *,
        engine_timeout_s: float,
        give_up: Callable[[PemaError], None],
    ) -> None:
        self._load = load
        self._state = state
        self._engine_timeout_s = engine_timeout_s
        self._give_up = give_up
        self._stopped = threading.Event()
        self.loading = False

    def run(self) -> None:
        """Load the model and watch it, in a thread of its own. Call `give_up` if that ends by a failure."""
        failure = self._serve()
        if failure is not None:
            gc.collect()  # a service in a reference cycle ends its engine, and vLLM's processes, only now
            self._give_up(failure)

    def stop(self) -> None:
        """Stop watching: the process is about to end, and the engine with it."""
        self._stopped.set()

    def _serve(self) -> PemaError | None:
        """Load the model and watch it. Return the failure, or None if the supervisor was stopped."""
        self.loading = True
        try:
            service = self._load()
        except PemaError as error:
            return error
        except Exception as error:
            log.debug("traceback", exc_info=True)
            return PemaError(f"The model could not be loaded: {type(error).__name__}: {error}")
        finally:
            self.loading = False
        self._state.service = service
        try:
            return self._watch(service)
        except Exception as error:
            log.debug("traceback", exc_info=True)
            return PemaError(f"The engine cannot be watched: {type(error).__name__}.", hint=_START_AGAIN)
        finally:
            # Dropping the last reference to a service ends its engine, which takes a while. When the process ends, that
            # is left to the main thread.
            if not self._stopped.is_set():
                self._state.fail()

    def _watch(self, service: PlmService) -> PemaError | None:
        """Watch the engine until it fails. Return the failure, or None if the supervisor was stopped."""
        scheduler, engine = service.scheduler, service.engine
        while not scheduler.broken.wait(min(_POLL_SECONDS, self._engine_timeout_s / 4)):
            is_alive = engine.is_alive()
            if self._stopped.is_set():
                return None
            if not is_alive:
                log.error("the engine has died")
                scheduler.close(engine_failed_error())
                return PemaError("The engine has died.", hint=_START_AGAIN)
            engine.evict_idle()
            if scheduler.busy_s > self._engine_timeout_s:
                scheduler.close(engine_failed_error())
                return EngineStuck(
                    f"The engine has not come back for {self._engine_timeout_s:g} s.",
                    hint="If the model is merely slow, raise --engine-timeout.",
                )
        return PemaError("The engine has failed its check after an error.", hint=_START_AGAIN)
