"""A TCP proxy that misbehaves on order."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """What becomes of a connection once so many bytes have come back from the server.

    Attributes:
        kind: `cut` resets it, `stall` leaves it open and forwards nothing more, `garble` goes on with random bytes,
            `garble-request` sends random bytes to the server in place of the client's next ones.
        then: called as that happens; for `garble`, every time.
    """

    kind: Literal["cut", "stall", "garble", "garble-request"]
    after_bytes: int
    then: Callable[[], None] = lambda: None


@contextmanager
def faulty_proxy(port: int, faults: Iterable[Fault]) -> Iterator[int]:
    """Forward a free local port to `port`; the connections take the faults in turn, those after them none.

    A fault that its connection did not come to, as one does not that found the server loading, waits for the next.
    """
    waiting, stop = deque(faults), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = []

    def to_server(client: socket.socket, server: socket.socket, garbling: threading.Event) -> None:
        noise = random.Random(8)
        with suppress(OSError):
            while data := client.recv(2**16):
                server.sendall(noise.randbytes(len(data)) if garbling.is_set() else data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def to_client(client: socket.socket, server: socket.socket, fault: Fault | None, garbling: threading.Event) -> None:
        left, noise, struck = fault.after_bytes if fault else 0, random.Random(7), False
        with suppress(OSError):
            while data := server.recv(2**16):
                if fault is not None and fault.kind == "garble-request":
                    left -= len(data)
                    if left < 0 and not garbling.is_set():
                        struck = True
                        fault.then()
                        garbling.set()
                elif fault is not None and len(data) > left:
                    struck = True
                    client.sendall(data[:left])
                    fault.then()
                    if fault.kind == "stall":
                        stop.wait()
                    if fault.kind == "cut":
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
                    data, left = noise.randbytes(len(data) - left), 0
                elif fault is not None:
                    left -= len(data)
                client.sendall(data)
        if fault is not None and not struck:
            waiting.appendleft(fault)
        for one in (client, server):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def accept() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", port))
                except OSError:  # it is down at the moment
                    client.close()
                    continue
                sockets.extend((client, server))
                fault, garbling = waiting.popleft() if waiting else None, threading.Event()
                threading.Thread(target=to_server, args=(client, server, garbling), daemon=True).start()
                threading.Thread(target=to_client, args=(client, server, fault, garbling), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
