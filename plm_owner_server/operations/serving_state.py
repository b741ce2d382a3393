"""The state of a server: the service once its model is loaded, the calls in progress, and the shutdown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from plm_owner_server.operations.call_log import CallRecorder
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import engine_failed_error
from protocol.errors import NotReady


def shutting_down_error() -> NotReady:
    """The error of calls that arrive while the server stops."""
    return NotReady(
        "The server is stopping.", hint="Try again in a moment: another one takes its place.", retry_after_s=5.0
    )


class ServingState:
    """The service while its model is loaded, and the number of calls that it answers.

    Args:
        service: a loaded service; None if the model is still loading.

    Attributes:
        service: the loaded service; None while the model loads, and after its engine has failed.
        recorder: writes the log, the metrics and the traces of every call.
        calls: number of calls in progress, from their arrival until their answer is handed to the transport.
    """

    def __init__(self, service: PlmService | None = None) -> None:
        self.service = service
        self.recorder = CallRecorder()
        self.calls = 0
        self._failed = False
        self._stopping = False

    def ready(self) -> PlmService:
        """The service.

        Raises:
            NotReady: the model is loading or has failed, or the server is stopping.
        """
        if self._stopping:
            raise shutting_down_error()
        if self._failed:
            raise engine_failed_error()
        if self.service is None:
            raise NotReady("The model is still loading.", hint="Try again in a moment.", retry_after_s=2.0)
        return self.service

    @property
    def is_ready(self) -> bool:
        """True if calls are answered."""
        return self.service is not None and not self._stopping

    @property
    def is_stopping(self) -> bool:
        """True once new calls are refused for good."""
        return self._stopping

    def fail(self) -> None:
        """Drop the service, whose engine has failed."""
        self.service = None
        self._failed = True

    def stop(self) -> None:
        """Refuse new calls from now on."""
        self._stopping = True

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count a call in progress. Call it in the event loop's thread."""
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1
