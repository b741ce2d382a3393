"""HTTP connections with bounds: on how many there are, and on how long each may keep the server waiting."""

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
"""Where a request's state has the common name in its client's certificate."""
_MIB = 2**20
# Besides those of connections: the model's, the store's, what libraries open.
_OTHER_FILES = 512
_COME_BACK_S = 2.0


def bounded_http_protocol(max_connections: int, transfer_s: float) -> Any:
    """The protocol of one server, for uvicorn's `http`.

    Args:
        max_connections: at the same time. One more takes the place of that which is idle longest.
        transfer_s: longest time that a request's head, each MiB of its body, and each MiB of an answer may take.
    """
    return partial(LimitedH11Protocol, idle=OrderedDict(), max_connections=max_connections, transfer_s=transfer_s)


def bound_handshakes(loop: asyncio.AbstractEventLoop, transfer_s: float) -> None:
    """Let TLS handshakes take no longer with servers that are started on this loop.

    uvicorn knows no such setting, and asyncio gives them a minute.
    """
    loop.create_server = partial(loop.create_server, ssl_handshake_timeout=transfer_s)  # type: ignore[method-assign]


def allow_open_files(connections: int) -> None:
    """Let this process have so many connections, as far as its owner allows; 1024 files are the rule otherwise."""
    with suppress(ImportError, OSError, ValueError):  # there may be no such limits, or none that can be changed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + _OTHER_FILES
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class LimitedH11Protocol(H11Protocol):
    """uvicorn's own, which waits for ever for the rest of a request and for an answer to be read.

    Args:
        idle: connections of this server without a request at work, those that are so longest first.
        max_connections: see `bounded_http_protocol`.
        transfer_s: see `bounded_http_protocol`.
    """

    def __init__(
        self,
        *args: Any,
        idle: OrderedDict[LimitedH11Protocol, None],
        max_connections: int,
        transfer_s: float,
        **named: Any,
    ) -> None:
        super().__init__(*args, **named)
        self._idle = idle
        self._max_connections = max_connections
        self._transfer_s = transfer_s
        self._arriving: asyncio.TimerHandle | None = None  # runs while the client is to send something
        self._arrived = 0
        self._leaving: asyncio.TimerHandle | None = None  # runs while the client is to read something
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (ssl_object := transport.get_extra_info("ssl_object")) is not None:
            self.app_state = self.app_state | {CERTIFICATE: common_name(ssl_object.getpeercert())}
        # Then all that waits to be read is noticed. Not 0: TLS pauses at it, also when nothing waits.
        transport.set_write_buffer_limits(high=1)
        if len(self.connections) > self._max_connections:
            if not self._idle:
                self._end_with(
                    Overloaded(
                        f"The server has {self._max_connections} connections.",
                        hint="Try again in a moment.",
                        retry_after_s=_COME_BACK_S,
                    )
                )
                return
            self._idle.popitem(last=False)[0].transport.close()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._arriving = _cancel(self._arriving)
        self._leaving = _cancel(self._leaving)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._arrived += len(data)
        if self._arrived >= _MIB and not self._answered():
            self._arriving, self._arrived = _cancel(self._arriving), 0
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._leaving = self.loop.call_later(self._transfer_s, self._look_at_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._leaving = _cancel(self._leaving)

    def _look(self) -> None:
        """Note whose turn it is: the client's with its request, or ours."""
        if self.transport.is_closing():
            self._idle.pop(self, None)
            return
        waiting = self.conn.their_state is h11.IDLE
        if not waiting:
            self._idle.pop(self, None)
        elif self not in self._idle:
            self._idle[self] = None
        if waiting or self.conn.their_state is h11.SEND_BODY:
            self._arriving = self._arriving or self.loop.call_later(self._transfer_s, self._not_arrived)
        else:
            self._arriving, self._arrived = _cancel(self._arriving), 0

    def _answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _not_arrived(self) -> None:
        if self.transport.is_closing():
            return
        # Without the beginning of a request it just was idle; after its answer nobody wants the rest.
        began = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if not began or (self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)):
            self.transport.close()
            return
        if self.conn.their_state is h11.SEND_BODY:  # for the application, the client has left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._end_with(
            RequestTimeout(
                f"The head of the request, or a MiB of its body, took longer than {self._transfer_s:g} s.",
                hint="Send less at a time, over a faster connection.",
            )
        )

    def _look_at_unread(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread > self._unread - _MIB:
            # The kernel, too, forgets what it was to send; with TLS, which has read all there was, it would go on.
            peer = self.transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self._unread = unread
        self._leaving = self.loop.call_later(self._transfer_s, self._look_at_unread)

    def _end_with(self, error: PemaError) -> None:
        """Answer without the application, and hang up."""
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
    """What is left of a timer."""
    if timer is not None:
        timer.cancel()
    return None
