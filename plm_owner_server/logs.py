"""Set-up of the server's log: the lines of the server and of its libraries, as text or as JSON.

Tracebacks show types and source lines, never the exceptions' messages, because these may quote clients' data.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from transformers.utils import logging as transformers_logging

try:
    import resource
except ImportError:  # Windows has no core files
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_REPORT_SECONDS = 60.0
_Info = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def set_up_logs(level: str, form: Literal["text", "json"]) -> None:
    """Send all messages of this process through one handler to standard error.

    Uncaught exceptions are logged. A crash in native code prints the stack of every thread.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False  # or a line that cannot be formatted would be printed with its values
    transformers_logging.disable_progress_bar()
    # transformers installs a handler of its own; its lines go through ours instead.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    for noisy in ("httpx", "httpcore", "filelock", "alembic", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    faulthandler.enable()


def formatter(form: Literal["text", "json"]) -> logging.Formatter:
    """The formatter of all of the server's lines."""
    return _JsonLines() if form == "json" else _TextLines()


def write_no_core_files() -> None:
    """Disable core files, because the memory image of a crash contains texts."""
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def logged_while(logger: logging.Logger, work: str) -> Iterator[None]:
    """Log the beginning and the end of long work, and a line a minute between them.

    Args:
        logger: the logger of the module that does the work.
        work: the work, as the beginning of a sentence: "converting the model".
    """
    started, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(_REPORT_SECONDS):
            logger.info("still %s, for %.0f s", work, time.monotonic() - started)

    logger.info("%s", work)
    reporting = threading.Thread(target=report, name="progress", daemon=True)
    reporting.start()
    try:
        yield
    finally:
        ended.set()
        reporting.join()
    logger.info("%s took %.1f s", work, time.monotonic() - started)


def redact_task_exceptions(loop: asyncio.AbstractEventLoop) -> None:
    """Log an event loop's failed tasks without their exceptions' messages, which the loop would quote."""

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error("%s", context["message"], exc_info=context.get("exception"))

    loop.set_exception_handler(report)


class _Lines(logging.Formatter):
    def formatException(self, ei: _Info) -> str:
        return "\n".join(_redacted_traceback(ei[1]))


class _TextLines(_Lines):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


class _JsonLines(_Lines, JsonFormatter):
    def __init__(self) -> None:
        JsonFormatter.__init__(
            self,
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger"},
            # uvicorn's, for terminals, and vLLM's, for its own formatter
            reserved_attrs=[*RESERVED_ATTRS, "color_message", "vllm_process_name"],
            timestamp="time",
        )


def _redacted_traceback(error: BaseException | None) -> Iterator[str]:
    """Types and stacks of an exception and of those that caused it, the last one first."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield type(error).__qualname__
        yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
        error = error.__cause__ or error.__context__


def _uncaught(exc_type: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(exc_type, (KeyboardInterrupt, SystemExit)):
        log.critical("uncaught exception", exc_info=(exc_type, error or exc_type(), trace))
