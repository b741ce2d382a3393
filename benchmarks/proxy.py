"""A TCP proxy that counts what passes, in bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
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
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                setattr(traffic, direction, getattr(traffic, direction) + len(data))
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, port))
                for pair in ((client, server, "to_server"), (server, client, "to_client")):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], traffic
    finally:
        listener.close()
