"""A TCP proxy on this machine, whose pumps count what passes, delay it or disturb it."""

from __future__ import annotations

import queue
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

_CHUNK_BYTES = 2**16

Pump = Callable[[socket.socket, socket.socket], None]
"""Passes on what one socket (the first) receives to the other, until the first is at its end."""
Pumps = Callable[[], tuple[Pump, Pump]]
"""Makes the two pumps of a new connection: to the server, and to the client."""


@contextmanager
def listener(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """Call `handle` with every connection to a free local port, one after the other; gives the port.

    All connections are closed at the end.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):  # the listening socket is closed
            while True:
                connection, _ = listening.accept()
                connections.append(connection)
                handle(connection)

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield int(listening.getsockname()[1])
    finally:
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        accepting.join()
        for connection in connections:
            _close(connection)


@contextmanager
def tcp_proxy(host: str, port: int, pumps: Pumps) -> Iterator[int]:
    """Forward a free local port to `host:port` through pumps; gives the local port.

    All connections are closed at the end. A connection that finds no server is closed at once.
    """

    def forward(client: socket.socket) -> None:
        try:
            server = socket.create_connection((host, port))
        except OSError:  # it is down at the moment
            client.close()
            return
        servers.callback(_close, server)
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        to_server, to_client = pumps()
        threading.Thread(target=to_server, args=(client, server), daemon=True).start()
        threading.Thread(target=to_client, args=(server, client), daemon=True).start()

    with ExitStack() as servers, listener(forward) as local_port:
        yield local_port


def pump(source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes] = bytes) -> None:
    """Pass on what one socket receives to the other, until the first is at its end.

    Args:
        source: socket to read from.
        target: socket to write to. Its stream ends with that of `source`.
        change: makes the bytes to pass on from those received.
    """
    with suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(change(data))
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@dataclass
class Traffic:
    """Bytes that passed in each direction."""

    to_server: int = 0
    to_client: int = 0


@contextmanager
def counting_proxy(host: str, port: int) -> Iterator[tuple[int, Traffic]]:
    """Forward a free local port to `host:port`; gives the local port and the counts."""
    traffic = Traffic()

    def counting(direction: Literal["to_server", "to_client"]) -> Pump:
        def count(data: bytes) -> bytes:
            setattr(traffic, direction, getattr(traffic, direction) + len(data))
            return data

        return partial(pump, change=count)

    with tcp_proxy(host, port, lambda: (counting("to_server"), counting("to_client"))) as local_port:
        yield local_port, traffic


@contextmanager
def recording_proxy(host: str, port: int) -> Iterator[tuple[int, bytearray]]:
    """Forward a free local port to `host:port`; gives the local port and all bytes that clients have sent so far.

    Bytes of several connections stand behind each other as they come.
    """
    sent = bytearray()

    def record(data: bytes) -> bytes:
        sent.extend(data)
        return data

    with tcp_proxy(host, port, lambda: (partial(pump, change=record), pump)) as local_port:
        yield local_port, sent


@contextmanager
def delaying_proxy(host: str, port: int, round_trip_seconds: float) -> Iterator[int]:
    """Forward a free local port to `host:port`, every byte half of `round_trip_seconds` later; gives the local port."""
    one_way_seconds = round_trip_seconds / 2

    def delay(source: socket.socket, target: socket.socket) -> None:
        on_the_way: queue.Queue[tuple[float, bytes]] = queue.Queue()

        def deliver() -> None:
            with suppress(OSError):
                while True:
                    due, data = on_the_way.get()
                    time.sleep(max(0.0, due - time.perf_counter()))
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    target.sendall(data)

        threading.Thread(target=deliver, daemon=True).start()
        with suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                on_the_way.put((time.perf_counter() + one_way_seconds, data))
        on_the_way.put((time.perf_counter() + one_way_seconds, b""))

    with tcp_proxy(host, port, lambda: (delay, delay)) as local_port:
        yield local_port


@dataclass(frozen=True)
class Fault:
    """A disturbance of one connection, once `after_bytes` bytes have come back from the server.

    Attributes:
        kind: `cut` resets it, `stall` leaves it open and forwards nothing more, `garble` goes on with random bytes,
            `garble-request` sends random bytes to the server in place of the client's next ones.
        after_bytes: bytes from the server that pass undisturbed since the fault before, on whatever connection.
        then: called as that happens.
    """

    kind: Literal["cut", "stall", "garble", "garble-request"]
    after_bytes: int
    then: Callable[[], None] = lambda: None


@contextmanager
def faulty_proxy(port: int, faults: Iterable[Fault]) -> Iterator[int]:
    """Forward a free local port to `port`; the faults strike one after the other.

    A fault strikes the connection whose bytes reach its count. Each connection is struck once at most.
    """
    schedule, stop = _FaultSchedule(faults), threading.Event()

    def pumps() -> tuple[Pump, Pump]:
        garbling = threading.Event()
        return _garbling_pump(garbling), _FaultyPump(schedule, garbling, stop)

    with tcp_proxy("127.0.0.1", port, pumps) as local_port:
        try:
            yield local_port
        finally:
            stop.set()


def _garbling_pump(garbling: threading.Event) -> Pump:
    noise = random.Random(8)
    return partial(pump, change=lambda data: noise.randbytes(len(data)) if garbling.is_set() else data)


class _FaultSchedule:
    """Counts the server's bytes over all connections, and tells when the next fault strikes."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self._waiting = deque(faults)
        self._passed = 0
        self._counting = threading.Lock()

    def strike(self, n_bytes: int) -> tuple[Fault, int] | None:
        """The fault that strikes within the next `n_bytes`, with the bytes before it; None where all may pass.

        Calls the fault's `then` before it returns; other connections wait meanwhile.
        """
        with self._counting:
            if not self._waiting:
                return None
            self._passed += n_bytes
            fault = self._waiting[0]
            if self._passed <= fault.after_bytes:
                return None
            undisturbed = fault.after_bytes - (self._passed - n_bytes)
            self._waiting.popleft()
            self._passed = 0
            fault.then()
            return fault, undisturbed


class _FaultyPump:
    """Passes on the server's bytes to the client until a fault strikes.

    Args:
        schedule: of the faults to come.
        garbling: set when requests are to be garbled.
        stop: ends a stall.
    """

    def __init__(self, schedule: _FaultSchedule, garbling: threading.Event, stop: threading.Event) -> None:
        self._schedule, self._garbling, self._stop = schedule, garbling, stop
        self._noise = random.Random(7)
        self._struck: Fault | None = None

    def __call__(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(_CHUNK_BYTES):
                passed_on = self._disturbed(data, client)
                if passed_on is None:
                    break
                client.sendall(passed_on)
        _close(client)
        _close(server)

    def _disturbed(self, data: bytes, client: socket.socket) -> bytes | None:
        """The bytes to pass on; None once the connection is to be reset."""
        undisturbed = 0
        if self._struck is None:
            struck = self._schedule.strike(len(data))
            if struck is None:
                return data
            self._struck, undisturbed = struck
        if self._struck.kind == "garble-request":
            self._garbling.set()
            return data
        client.sendall(data[:undisturbed])
        if self._struck.kind == "stall":
            self._stop.wait()
        if self._struck.kind == "cut":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return None
        return self._noise.randbytes(len(data) - undisturbed)
