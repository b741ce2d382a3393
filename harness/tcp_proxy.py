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
        after_bytes: bytes from the server that pass undisturbed.
        then: called as that happens; for `garble`, every time.
    """

    kind: Literal["cut", "stall", "garble", "garble-request"]
    after_bytes: int
    then: Callable[[], None] = lambda: None


@contextmanager
def faulty_proxy(port: int, faults: Iterable[Fault]) -> Iterator[int]:
    """Forward a free local port to `port`; the connections take the faults in turn, those after them none.

    A fault that did not strike its connection, because the server was still loading, waits for the next connection.
    """
    waiting, stop = deque(faults), threading.Event()

    def pumps() -> tuple[Pump, Pump]:
        fault, garbling = waiting.popleft() if waiting else None, threading.Event()
        return _garbling_pump(garbling), _FaultyPump(fault, garbling, stop, waiting.appendleft)

    with tcp_proxy("127.0.0.1", port, pumps) as local_port:
        try:
            yield local_port
        finally:
            stop.set()


def _garbling_pump(garbling: threading.Event) -> Pump:
    noise = random.Random(8)
    return partial(pump, change=lambda data: noise.randbytes(len(data)) if garbling.is_set() else data)


class _FaultyPump:
    """Passes on the server's bytes to the client until a fault strikes.

    Args:
        fault: None for an undisturbed connection.
        garbling: set when requests are to be garbled.
        stop: ends a stall.
        give_back: takes a fault that did not strike.
    """

    def __init__(
        self,
        fault: Fault | None,
        garbling: threading.Event,
        stop: threading.Event,
        give_back: Callable[[Fault], None],
    ) -> None:
        self._fault, self._garbling, self._stop, self._give_back = fault, garbling, stop, give_back
        self._left = fault.after_bytes if fault else 0
        self._noise = random.Random(7)
        self._struck = False

    def __call__(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(_CHUNK_BYTES):
                passed_on = data if self._fault is None else self._disturbed(self._fault, data, client)
                if passed_on is None:
                    break
                client.sendall(passed_on)
        if self._fault is not None and not self._struck:
            self._give_back(self._fault)
        _close(client)
        _close(server)

    def _disturbed(self, fault: Fault, data: bytes, client: socket.socket) -> bytes | None:
        """The bytes to pass on; None once the connection is to be reset."""
        if fault.kind == "garble-request":
            self._left -= len(data)
            if self._left < 0 and not self._garbling.is_set():
                self._struck = True
                fault.then()
                self._garbling.set()
            return data
        if len(data) <= self._left:
            self._left -= len(data)
            return data
        self._struck = True
        client.sendall(data[: self._left])
        fault.then()
        if fault.kind == "stall":
            self._stop.wait()
        if fault.kind == "cut":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return None
        garbled = self._noise.randbytes(len(data) - self._left)
        self._left = 0
        return garbled
