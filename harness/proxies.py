"""Proxies that a client chooses (HTTP, SOCKS 5), and gateways before a server, on this machine and in this process."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from harness.tcp_proxy import listener, pump

_CHUNK_BYTES = 2**16
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM = 0, 1, 3
_END_STREAM_AND_HEADERS = 5
_CANCEL = struct.pack("!I", 8)


@dataclass
class Record:
    """Requests that a proxy or a gateway has seen.

    Attributes:
        port: its local port.
        seen: heads of requests, or names of hosts.
        answered: sizes of requests that it passed on, in bytes.
        refused: sizes of requests that it answered itself, in bytes.
    """

    port: int = 0
    seen: list[str] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)


@contextmanager
def http_proxy(port: int, *, refusal: bytes | None = None) -> Iterator[Record]:
    """A proxy that leads to `port` of this machine, whatever host is requested.

    Args:
        port: port of the server.
        refusal: response to every request; None to connect, empty to hang.
    """
    record = Record()

    def handle(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := client.recv(_CHUNK_BYTES)):
                return
            head += data
        record.seen.append(head.decode("latin-1"))
        if refusal is not None:
            client.sendall(refusal)
            while client.recv(_CHUNK_BYTES) or not refusal:
                pass
        elif head.startswith(b"CONNECT "):
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            _connect(client, port, b"")
        else:
            _connect(client, port, _for_server(head))

    with _serving(handle) as record.port:
        yield record


def _for_server(head: bytes) -> bytes:
    """The head of a request to a proxy as a server takes it: with a path in place of a URL, and one a connection."""
    first, _, rest = head.partition(b"\r\n")
    method, url, version = first.split(b" ")
    path = b"/" + url.partition(b"://")[2].partition(b"/")[2]
    rest = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", b"\r\n" + rest)
    return b" ".join((method, path, version)) + b"\r\nConnection: close" + rest


@contextmanager
def socks_proxy(port: int) -> Iterator[Record]:
    """A SOCKS 5 proxy without passwords that leads to `port` of this machine, whatever host is requested."""
    record = Record()

    def handle(client: socket.socket) -> None:
        client.recv(_CHUNK_BYTES)
        client.sendall(b"\x05\x00")
        request = client.recv(_CHUNK_BYTES)
        record.seen.append(request[5 : 5 + request[4]].decode("ascii"))
        client.sendall(b"\x05\x00\x00\x01" + bytes(6))
        _connect(client, port, b"")

    with _serving(handle) as record.port:
        yield record


@contextmanager
def http_gateway(
    url: str, *, most_bytes: int, status: int, location: str | None = None, prefix: str = ""
) -> Iterator[Record]:
    """A gateway before a REST server that answers some requests itself.

    Args:
        url: address of the server.
        most_bytes: size of the largest body that it passes on.
        status: its answer to larger ones, and to paths that do not begin with `prefix`.
        location: where that answer redirects to.
        prefix: what it takes off the paths.
    """
    record = Record()
    page = {"Content-Type": "text/html"} | ({} if location is None else {"Location": location})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            record.seen.append(self.path)
            if len(body) > most_bytes or not self.path.startswith(prefix):
                record.refused.append(len(body))
                self._respond(status, page, b"<html>")
                return
            record.answered.append(len(body))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            response = upstream.request(self.command, self.path[len(prefix) :], content=body, headers=headers)
            kept = {name: value for name, value in response.headers.items() if name != "content-length"}
            self._respond(response.status_code, kept, response.content)

        def _respond(self, code: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(code)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    with (
        httpx.Client(base_url=url, timeout=60, trust_env=False) as upstream,
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
    ):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        record.port = server.server_port
        try:
            yield record
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def grpc_gateway(port: int, *, most_bytes: int, status: int) -> Iterator[Record]:
    """A gateway before a gRPC server that answers HTTP `status` to every call with larger messages.

    It passes on HTTP/2 frames as they are. It ends a refused stream on both sides.
    """
    record = Record()

    def handle(client: socket.socket) -> None:
        with closing(socket.create_connection(("127.0.0.1", port))) as server:
            sizes, refused = defaultdict[int, int](int), set[int]()
            lock = threading.Lock()  # frames reach the client from both directions

            def to_client(frame: _Frame) -> None:
                with lock:
                    client.sendall(frame.to_bytes())

            def answers() -> None:
                with suppress(OSError):
                    for frame in _frames(server):
                        if frame.stream not in refused:
                            to_client(frame)
                    client.shutdown(socket.SHUT_RDWR)

            thread = threading.Thread(target=answers)
            thread.start()
            with suppress(OSError):
                server.sendall(_exactly(client, len(_HTTP2_PREFACE)))
                for frame in _frames(client):
                    if frame.stream in refused:
                        continue
                    sizes[frame.stream] += len(frame.payload) if frame.kind == _DATA else 0
                    if sizes[frame.stream] > most_bytes:
                        refused.add(frame.stream)
                        record.refused.append(sizes[frame.stream])
                        server.sendall(_Frame(_RST_STREAM, 0, frame.stream, _CANCEL).to_bytes())
                        to_client(_Frame(_HEADERS, _END_STREAM_AND_HEADERS, frame.stream, _status_block(status)))
                        continue
                    server.sendall(frame.to_bytes())
                    if frame.kind == _DATA and frame.flags & 1:
                        record.answered.append(sizes[frame.stream])
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join()

    with _serving(handle) as record.port:
        yield record


@dataclass(frozen=True)
class _Frame:
    """An HTTP/2 frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    def to_bytes(self) -> bytes:
        length = len(self.payload).to_bytes(3, "big")
        return length + struct.pack("!BBI", self.kind, self.flags, self.stream) + self.payload


def _frames(source: socket.socket) -> Iterator[_Frame]:
    while head := _exactly(source, 9):
        kind, flags, stream = struct.unpack("!BBI", head[3:])
        yield _Frame(kind, flags, stream, _exactly(source, int.from_bytes(head[:3], "big")))


def _status_block(status: int) -> bytes:
    """The header `:status`, as a literal that is not indexed: it leaves the compression's state as it is."""
    name, value = b":status", str(status).encode("ascii")
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _exactly(source: socket.socket, size: int) -> bytes:
    """The next bytes; none at the end."""
    data = b""
    while len(data) < size:
        if not (more := source.recv(size - len(data))):
            return b""
        data += more
    return data


@contextmanager
def _serving(handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """Handle every connection to a free local port in a thread, and close it; gives the port."""

    def serve(client: socket.socket) -> None:
        with suppress(OSError), closing(client):
            handle(client)

    with listener(lambda client: threading.Thread(target=serve, args=(client,), daemon=True).start()) as port:
        yield port


def _connect(client: socket.socket, port: int, first: bytes) -> None:
    """Connect a client with a server, which receives the bytes `first` before all others."""
    with closing(socket.create_connection(("127.0.0.1", port))) as server:
        server.sendall(first)
        back = threading.Thread(target=pump, args=(server, client), daemon=True)
        back.start()
        pump(client, server)
        back.join()
