"""HTTP connections with limits: on their number, and on the time that each may keep the server waiting."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from plm_owner_server.transports.tls import common_name
from protocol.errors import PROBLEM_JSON, Overloaded, PemaError, RequestTimeout, to_problem

CERTIFICATE = "certificate"
"""Name in a request's state of the common name in its client's certificate."""
_MIB = 2**20
# Open files besides connections: of the model, the store and libraries.
_OTHER_FILES = 512
_RETRY_AFTER_SECONDS = 2.0


def bounded_http_protocol(max_connections: int, transfer_s: float) -> Any:
    """The protocol of one server, for uvicorn's `http`.

    Args:
        max_connections: largest number of connections. A further one replaces the one that has been idle longest.
        transfer_s: longest time for a request's head, each MiB of its body, and each MiB of an answer, in seconds.
    """
    return partial(LimitedH11Protocol, idle=OrderedDict(), max_connections=max_connections, transfer_s=transfer_s)


def bound_handshakes(loop: asyncio.AbstractEventLoop, transfer_s: float) -> None:
    """Limit the time of TLS handshakes with servers that are started on this loop.

    uvicorn has no such setting, and asyncio's default is a minute.
    """
    loop.create_server = partial(loop.create_server, ssl_handshake_timeout=transfer_s)  # type: ignore[method-assign]


def allow_open_files(connections: int) -> None:
    """Raise the process's limit of open files for this many connections, up to its hard limit.

    The usual limit is 1024 files.
    """
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; elsewhere it may be fixed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = connections + _OTHER_FILES
        if hard != resource.RLIM_INFINITY:
            needed = min(needed, hard)
        if soft != resource.RLIM_INFINITY and soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class LimitedH11Protocol(H11Protocol):
    """uvicorn's protocol with time limits. uvicorn itself waits for ever for a request, and for a reader of an answer.

    Args:
        idle: this server's connections without a request in progress, the longest idle first.
        max_connections: see `bounded_http_protocol`.
        transfer_s: see `bounded_http_protocol`.
    """

    def __init__(
        self,
        *args: Any,
        idle: OrderedDict[LimitedH11Protocol, None],
        max_connections: int,
        transfer_s: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._idle = idle
        self._max_connections = max_connections
        self._transfer_s = transfer_s
        self._receive_timer: asyncio.TimerHandle | None = None  # runs while the client must send
        self._received_bytes = 0
        self._send_timer: asyncio.TimerHandle | None = None  # runs while the client must read
        self._unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (ssl_object := transport.get_extra_info("ssl_object")) is not None:
            self.app_state = self.app_state | {CERTIFICATE: common_name(ssl_object.getpeercert())}
        # So that writing pauses as soon as bytes wait. With 0, TLS would pause even when none wait.
        transport.set_write_buffer_limits(high=1)
        if len(self.connections) > self._max_connections:
            if not self._idle:
                self._end_with(
                    Overloaded(
                        f"The server has {self._max_connections} connections.",
                        hint="Try again in a moment.",
                        retry_after_s=_RETRY_AFTER_SECONDS,
                    )
                )
                return
            self._idle.popitem(last=False)[0].transport.close()
        self._update_timers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._receive_timer = _cancel(self._receive_timer)
        self._send_timer = _cancel(self._send_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received_bytes += len(data)
        if self._received_bytes >= _MIB and not self._answered():
            self._receive_timer, self._received_bytes = _cancel(self._receive_timer), 0
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._update_timers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self._transfer_s, self._check_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._send_timer = _cancel(self._send_timer)

    def _update_timers(self) -> None:
        """Start or stop the receive timer, by whether the client or the server must act next."""
        if self.transport.is_closing():
            self._idle.pop(self, None)
            return
        waiting = self.conn.their_state is h11.IDLE
        if not waiting:
            self._idle.pop(self, None)
        elif self not in self._idle:
            self._idle[self] = None
        if waiting or self.conn.their_state is h11.SEND_BODY:
            self._receive_timer = self._receive_timer or self.loop.call_later(self._transfer_s, self._receive_timed_out)
        else:
            self._receive_timer, self._received_bytes = _cancel(self._receive_timer), 0

    def _answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _receive_timed_out(self) -> None:
        if self.transport.is_closing():
            return
        # Without the beginning of a request, the connection was just idle. After the answer, the rest does not matter.
        began = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if not began or (self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)):
            self.transport.close()
            return
        if self.conn.their_state is h11.SEND_BODY:  # for the application, the client has disconnected
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._end_with(
            RequestTimeout(
                f"The head of the request, or a MiB of its body, took longer than {self._transfer_s:g} s.",
                hint="Send less at a time, over a faster connection.",
            )
        )

    def _check_unread(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread > self._unread_bytes - _MIB:
            # Make the kernel drop its send buffer, too. With TLS it holds all bytes, and would go on sending.
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self._unread_bytes = unread
        self._send_timer = self.loop.call_later(self._transfer_s, self._check_unread)

    def _end_with(self, error: PemaError) -> None:
        """Answer without the application, and close the connection."""
        body = json.dumps(to_problem(error)).encode()
        headers = [("content-type", PROBLEM_JSON), ("content-length", str(len(body))), ("connection", "close")]
        if error.retry_after_s is not None:
            headers.append(("retry-after", f"{error.retry_after_s:.0f}"))
        for event in (
            h11.Response(status_code=error.http_status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer; always returns None."""
    if timer is not None:
        timer.cancel()
    return None
