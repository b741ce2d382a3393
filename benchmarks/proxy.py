"""TCP proxies on this machine: one counts what passes, one delays it."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass
class Traffic:
    """Bytes that passed in each direction."""

    to_server: int = 0
    to_client: int = 0


@contextmanager
def counting_proxy(host: str, port: int) -> Iterator[tuple[int, Traffic]]:
    """Forward a free local port to `host:port`; gives the port and the counts."""
    traffic = Traffic()

    def pump(source: socket.socket, target: socket.socket, direction: str) -> None:
        while data := source.recv(2**16):
            setattr(traffic, direction, getattr(traffic, direction) + len(data))
            target.sendall(data)

    with _forwarding(host, port, pump) as listening:
        yield listening, traffic


@contextmanager
def delaying_proxy(host: str, port: int, round_trip_s: float) -> Iterator[int]:
    """Forward a free local port to `host:port`, every byte half of `round_trip_s` later; gives the port."""

    def pump(source: socket.socket, target: socket.socket, direction: str) -> None:
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
        try:
            while data := source.recv(2**16):
                on_the_way.put((time.perf_counter() + round_trip_s / 2, data))
        finally:
            on_the_way.put((time.perf_counter() + round_trip_s / 2, b""))

    with _forwarding(host, port, pump, shut_down=False) as listening:
        yield listening


Pump = Callable[[socket.socket, socket.socket, str], None]


@contextmanager
def _forwarding(host: str, port: int, pump: Pump, *, shut_down: bool = True) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def forward(source: socket.socket, target: socket.socket, direction: str) -> None:
        with suppress(OSError):
            pump(source, target, direction)
        if shut_down:
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, port))
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for pair in ((client, server, "to_server"), (server, client, "to_client")):
                    threading.Thread(target=forward, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
