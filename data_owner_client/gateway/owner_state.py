"""State of the PLM owner's server, as the gateway's health shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from protocol.errors import ConnectionFailed, NotReady, Overloaded, PemaError
from protocol.messages import ModelCard

OwnerState = Literal["ok", "busy", "away", "refuses", "other_model"]
"""State of the owner's server: it answers, is overloaded, does not answer, refuses calls, or has another model."""
_FRESH_SECONDS = 5.0


class OwnerProbe:
    """Asks the owner's server for its model card, at most once in five seconds.

    Args:
        ask: asks for the model card, once and without patience.
        digest: digest of the model that the gateway serves.
    """

    def __init__(self, ask: Callable[[], ModelCard], digest: str) -> None:
        self._ask = ask
        self._digest = digest
        self._lock = threading.Lock()
        self._state: OwnerState = "ok"
        self._fresh_until = 0.0

    def state(self) -> OwnerState:
        """The state, which is at most five seconds old; blocks while the server is asked."""
        with self._lock:
            if time.monotonic() >= self._fresh_until:
                self._state = self._asked()
                self._fresh_until = time.monotonic() + _FRESH_SECONDS
            return self._state

    def _asked(self) -> OwnerState:
        try:
            digest = self._ask().digest
        except Overloaded:
            return "busy"
        except (ConnectionFailed, NotReady):
            return "away"
        except PemaError:
            return "refuses"
        return "ok" if digest == self._digest else "other_model"
