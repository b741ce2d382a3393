"""Smaller requests where larger ones find no answer: behind a gateway that limits times or sizes, or a slow server."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from data_owner_client.plm.connection.settings import ConnectionSettings
from protocol.chunks import join_head, join_rows
from protocol.errors import AnswerLost, GatewayFailed, PayloadTooLarge, PemaError, RequestTimeout, TimedOut
from protocol.messages import DecodeRequest, DecodeResponse, EncodeRequest, EncodeResponse, HeadRequest, HeadRows

log = logging.getLogger(__name__)

# A smaller request may be answered where a larger one ended in one of these.
_SIGNS_OF_SIZE = (TimedOut, RequestTimeout, PayloadTooLarge, AnswerLost)
# Answers after which requests may be twice as large again: a gateway's limit then costs one lost request of these.
_ANSWERS_BEFORE_GROWTH = 100
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_RowsRequest = TypeVar("_RowsRequest", EncodeRequest, DecodeRequest)
_RowsResponse = TypeVar("_RowsResponse", EncodeResponse, DecodeResponse)
Send = Callable[[_Request, bool], _Response]
"""Sends a request; a divisible one (the second argument) is repeated less often when there is no answer."""


class RequestDivision:
    """Divides the requests of one connection into those that are answered; thread-safe.

    A request that ends in a gateway's time-out, is too large or repeatedly has no answer is sent again as two halves,
    down to single sequences or rows. Later requests are divided beforehand. After a hundred answers they may be twice
    as large again.

    Args:
        settings: the connection's. After its own time-outs a request is divided until `retry_for` is over. Lost
            requests are not divided where none are repeated.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        # The call and its repetition, before it is divided.
        self._patience_s = 2 * settings.timeout + settings.retry_for
        self._divides_lost = settings.retry_for > 0
        self._rows_limit, self._head_limit = _SizeLimit("tokens"), _SizeLimit("rows of the LM head")

    def rows(self, request: _RowsRequest, send: Send[_RowsRequest, _RowsResponse]) -> _RowsResponse:
        """The answer to an encode or decode request, in one piece."""

        def part(request: _RowsRequest, sequences: slice) -> _RowsRequest:
            lists = ("token_ids", "from_position", "look_ahead", "echo")
            values = {name: getattr(request, name, None) for name in lists}
            return request.model_copy(update={name: value[sequences] for name, value in values.items() if value})

        return _Division(
            send=send,
            join=join_rows,
            part=part,
            count=lambda request: len(request.token_ids),
            size=lambda request: sum(map(len, request.token_ids)) + sum(getattr(request, "look_ahead", ())),
            limit=self._rows_limit,
            deadline=time.monotonic() + self._patience_s,
            divides_lost=self._divides_lost,
        ).answer(request)

    def head(self, request: HeadRequest, send: Send[HeadRequest, HeadRows]) -> HeadRows:
        """The requested rows of the LM head, in one piece."""

        def part(request: HeadRequest, rows: slice) -> HeadRequest:
            if request.token_ids is not None:
                return request.model_copy(update={"token_ids": request.token_ids[rows]})
            chosen = range(request.start, request.stop or 0)[rows]
            return request.model_copy(update={"start": chosen.start, "stop": chosen.stop})

        return _Division(
            send=send,
            join=join_head,
            part=part,
            count=_head_rows,
            size=_head_rows,
            limit=self._head_limit,
            deadline=time.monotonic() + self._patience_s,
            divides_lost=self._divides_lost,
        ).answer(request)


def _head_rows(request: HeadRequest) -> int:
    """The number of requested rows; 1 for all rows from the start on, whose number only the server knows."""
    if request.token_ids is not None:
        return len(request.token_ids)
    return 1 if request.stop is None else request.stop - request.start


@dataclass(frozen=True)
class _Division(Generic[_Request, _Response]):
    """The division of one request.

    Attributes:
        send: sends a part.
        join: joins the answers of consecutive parts.
        part: a part of a request.
        count: number of items of a request: it can be divided into as many parts.
        size: size of a request, which grows with its time and its bytes.
        limit: size from which requests are divided before they are sent.
        deadline: time (`time.monotonic`) after which the client's own time-outs are final.
        divides_lost: whether requests that were lost are divided, too.
    """

    send: Send[_Request, _Response]
    join: Callable[[Sequence[_Response]], _Response]
    part: Callable[[_Request, slice], _Request]
    count: Callable[[_Request], int]
    size: Callable[[_Request], int]
    limit: _SizeLimit
    deadline: float
    divides_lost: bool

    def answer(self, request: _Request) -> _Response:
        """The answer to a request, or to its two halves."""
        divisible = self.count(request) > 1
        if divisible and self.size(request) > self.limit.size:
            return self._joined_answer(self._halves(request))
        try:
            response = self.send(request, divisible)
        except _SIGNS_OF_SIZE as error:
            if not divisible or self._is_final(error):
                raise
            halves = self._halves(request)
            self.limit.reduce(max(map(self.size, halves)), error)
            return self._joined_answer(halves)
        self.limit.count_answer()
        return response

    def _halves(self, request: _Request) -> tuple[_Request, _Request]:
        middle = self.count(request) // 2
        return self.part(request, slice(0, middle)), self.part(request, slice(middle, None))

    def _joined_answer(self, parts: Sequence[_Request]) -> _Response:
        return self.join([self.answer(part) for part in parts])

    def _is_final(self, error: PemaError) -> bool:
        """True if a lost request is an error, or the server may hang: dividing after time-outs would take hours."""
        if isinstance(error, GatewayFailed):
            return False
        if isinstance(error, AnswerLost):
            return not self.divides_lost
        return isinstance(error, TimedOut) and time.monotonic() > self.deadline


class _SizeLimit:
    """Largest size of a request that is sent undivided; thread-safe.

    Attributes:
        size: the limit, in units.
    """

    def __init__(self, unit: str) -> None:
        self.size: float = math.inf
        self._unit = unit
        self._answers = 0
        self._is_reported = False
        self._lock = threading.Lock()

    def reduce(self, size: int, error: PemaError) -> None:
        """Divide requests larger than `size` from now on, as `error` ended such a one."""
        with self._lock:
            self._answers = 0
            self.size = min(self.size, size)
            level = logging.DEBUG if self._is_reported else logging.WARNING
            self._is_reported = True
        log.log(level, "%s Sending smaller requests: at most %d %s at once.", error, self.size, self._unit)

    def count_answer(self) -> None:
        """Let requests be larger again after many answers."""
        with self._lock:
            self._answers += 1
            if self._answers >= _ANSWERS_BEFORE_GROWTH:
                self._answers = 0
                self.size *= 2
