"""What both transports do with what went wrong."""

from __future__ import annotations

import logging
import traceback
import uuid

from protocol.errors import PemaError, ServerFault

log = logging.getLogger(__name__)


def answerable(error: Exception, request_id: str, call: str) -> PemaError:
    """The error that the client shall see, with the request's id; a fault of ours is logged, and told as no more."""
    if not isinstance(error, PemaError):
        # Type and place only: an exception's text may quote the data that caused it.
        log.error("%s: %s in %s", request_id, type(error).__name__, call)
        log.debug("%s: traceback\n%s", request_id, "".join(traceback.format_tb(error.__traceback__)))
        error = ServerFault("The server failed.", hint="Report the request id to its owner; trying again may help.")
    error.request_id = request_id
    return error


def request_id_of(given: str) -> str:
    """The client's own id for a request if it is fit for a log, else a new one."""
    return given if given.isascii() and 0 < len(given) <= 64 and given.isprintable() else uuid.uuid4().hex
