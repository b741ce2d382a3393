"""The gateway's process: its socket, its log, and its end."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType

import uvicorn
from fastapi import FastAPI

from protocol.errors import PemaError

log = logging.getLogger(__name__)

# Time for answers under way when the gateway is stopped.
DRAIN_SECONDS = 10
_BACKLOG = 2048
_OURS, _UVICORN = "data_owner_client", "uvicorn.error"
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, before any longer work; closed at the end.

    Args:
        host: name or address to listen on.
        port: port to listen on; 0 takes a free one.

    Raises:
        PemaError: the gateway cannot listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, or asyncio would not turn Nagle's delay of 40 ms off.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise PemaError(
                f"Cannot listen on port {port} of {host}: {(error.strerror or str(error)).lower()}.",
                hint="Choose another --port, or a --host that is an address of this machine.",
            ) from error
        yield listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; answers under way then have ten seconds to end. A second signal ends at once."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server whose end by a signal is a clean one: uvicorn itself would raise the signal again."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        log.info("stopping: answers under way have %d s to end", DRAIN_SECONDS)
        self.should_exit = True


def close_in_time(close: Callable[[], None], seconds: float) -> None:
    """Run `close`, and go on after some seconds if it still waits for the owner's server."""
    closing = threading.Thread(target=close, name="closing", daemon=True)
    closing.start()
    closing.join(seconds)


@contextmanager
def logged_to_stderr(level: str) -> Iterator[None]:
    """Log with times to standard error, and without the messages of unexpected exceptions, which may hold text.

    Args:
        level: least severe lines.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    with ExitStack() as stack:
        stack.enter_context(_handled(logging.getLogger(_OURS), handler, level))
        # What uvicorn says of its start and end is said here already.
        stack.enter_context(_handled(logging.getLogger(_UVICORN), handler, "warning"))
        yield


@contextmanager
def _handled(logger: logging.Logger, handler: logging.Handler, level: str) -> Iterator[None]:
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    if logger.level != logging.DEBUG:  # the choice of --verbose
        logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.handlers, _, logger.propagate = before
        logger.setLevel(before[1])


class _Lines(logging.Formatter):
    def formatException(self, ei: _ExcInfo) -> str:
        return "\n".join([type(ei[1]).__qualname__, "".join(traceback.format_tb(ei[2])).rstrip()])
