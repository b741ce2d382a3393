"""A service over a tiny model, and servers of it over REST and gRPC, in the process of the tests."""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import torch

from data_owner_client.plm.connection.base import Connection
from harness import tiny_models
from harness.tiny_models import ARCHITECTURES, TELLING, VOCAB_SIZE
from plm_owner_server.admission.allowed_hosts import AllowedHosts
from plm_owner_server.admission.authentication import Authenticator
from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.engines.interface import Engine
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.model_files.digest import digest_folder
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.settings import ENGINES, ServerSettings
from plm_owner_server.tenants.tables import METADATA
from tests import guard

if TYPE_CHECKING:
    from fastapi import FastAPI

MASTER_SECRET = b"the master secret of all servers in tests"

ARCHITECTURES_IN_CI = [pytest.param(name, marks=() if name in TELLING else pytest.mark.slow) for name in ARCHITECTURES]
"""All architectures as parameters of a test: those that are not telling are left to `make test`."""

engine = "transformers"
"""What runs the models of all servers (`pytest --engine`)."""


def use_engine(name: str) -> None:
    """Let all servers, those of their own process included, run their models by this engine."""
    global engine
    engine = name
    if name == "vllm":
        tiny_models.for_vllm = True
        # Of a tiny model's attention states there are few, and compiling it takes longer than it ever runs.
        options = '{"kv_cache_memory_bytes": 67108864, "enforce_eager": true}'
        os.environ["PEMA_VLLM_OPTIONS"] = options
    if name != next(iter(ENGINES)):
        os.environ["PEMA_ENGINE"] = name


device = "cpu"
"""Device of all models of the engine over transformers (`pytest --device`)."""


def use_device(name: str) -> None:
    """Let the engine over transformers run its models on this device."""
    global device
    device = name


def make_settings(**settings: Any) -> ServerSettings:
    """Server settings that no `.env` file of the developer changes."""
    return ServerSettings(_env_file=None, **settings)


def make_service(
    folder: Path, *, wrap: Callable[[Any], Any] | None = None, shared: bool = True, **settings: Any
) -> PlmService:
    """The service over the model in `folder`, warmed up: in float32 on the device of the tests.

    Args:
        wrap: puts something around the engine, for tests of failures.
        shared: the processes behind the engine may be those of another service, where it has any.
        settings: of `ServerSettings`.
    """
    chosen = make_settings(**{"model": str(folder), "device": device, "dtype": "float32"} | settings)
    engine = _engine(folder, chosen) if shared else load_engine(folder, chosen)
    return PlmService(
        wrap(engine) if wrap else engine,
        load_tokenizer(folder),
        name=folder.name,
        weights_digest=digest_folder(folder),
        settings=chosen,
        master_secret=lambda: MASTER_SECRET,
    )


def _engine(folder: Path, settings: ServerSettings) -> Engine:
    if settings.engine == "transformers":
        return load_engine(folder, settings)
    # Its start takes many seconds; a copy, as a test may change what it does.
    return copy.copy(_started(folder, settings.prefix_cache_mib > 0))


@lru_cache(maxsize=2)  # each is a process
def _started(folder: Path, prefix_cache: bool) -> Engine:
    mib = 64 if prefix_cache else 0
    return load_engine(folder, make_settings(device="cpu", dtype="float32", prefix_cache_mib=mib))


@contextmanager
def run_app(app: FastAPI, *, max_connections: int = 1000, transfer_s: float = 30.0) -> Iterator[str]:
    """Run an ASGI application with uvicorn in a thread on a free port, as the server does; gives its base URL."""
    # Not above: the tests of the engine also run on machines that lack the packages of the transports.
    import uvicorn

    from plm_owner_server.transports.http_protocol import bounded_http_protocol

    # With its protocol named, or asyncio would not turn Nagle's delay of 40 ms off.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        http: Any = bounded_http_protocol(max_connections, transfer_s)
        context = guard.current.certificate.context() if guard.current else None
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http=http,
            ws="none",
            ssl_context_factory=(lambda *_: context) if context else None,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield guard.url("http", listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serve(
    service: PlmService | None,
    *,
    max_body_bytes: int | None = None,
    access: Authenticator | None = None,
    **connections: Any,
) -> Iterator[str]:
    """Serve over REST and give the base URL; without a service, as a server whose model is still loading."""
    with serve_state(
        ServingState(service), access or guard.access(), max_body_bytes=max_body_bytes, **connections
    ) as url:
        yield url


@contextmanager
def serve_state(
    state: ServingState,
    access: Authenticator | None = None,
    *,
    max_body_bytes: int | None = None,
    hosts: AllowedHosts | None = None,
    **connections: Any,
) -> Iterator[str]:
    """Serve over REST and give the base URL."""
    from plm_owner_server.transports.rest_app import create_app

    if max_body_bytes is None:
        max_body_bytes = state.service.model_card().limits.max_body_bytes if state.service else 2**20
    controller = AdmissionController(state, access, hosts=hosts)
    with run_app(create_app(controller, max_body_bytes=max_body_bytes), **connections) as url:
        yield url


@contextmanager
def serve_over_grpc(
    service: PlmService | None, *, max_body_bytes: int = 2**24, access: Authenticator | None = None, **connections: Any
) -> Iterator[str]:
    """Serve over gRPC on an event loop of its own and give the address, grpc://…."""
    with serve_state_over_grpc(
        ServingState(service), access or guard.access(), max_body_bytes=max_body_bytes, **connections
    ) as url:
        yield url


@contextmanager
def connection_over(transport: str, service: PlmService) -> Iterator[Connection]:
    """Serve over `rest` or `grpc` and give a client's connection."""
    with (
        (serve if transport == "rest" else serve_over_grpc)(service) as url,
        closing(guard.connection(url)) as client,
    ):
        yield client


@contextmanager
def serve_state_over_grpc(
    state: ServingState,
    access: Authenticator | None = None,
    *,
    max_body_bytes: int = 2**24,
    hosts: AllowedHosts | None = None,
    **connections: Any,
) -> Iterator[str]:
    """Serve over gRPC on an event loop of its own and give the address, grpc://…."""
    from plm_owner_server.transports.grpc_server import serve_grpc

    ready, stop = threading.Event(), threading.Event()
    ports: list[int] = []
    credentials = guard.current.certificate.grpc_credentials() if guard.current else None

    async def run() -> None:
        async with serve_grpc(
            AdmissionController(state, access, hosts=hosts),
            "127.0.0.1",
            0,
            max_body_bytes=max_body_bytes,
            max_calls=64,
            credentials=credentials,
            **connections,
        ) as port:
            ports.append(port)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="grpc")
    thread.start()
    try:
        assert ready.wait(60)
        yield guard.url("grpc", ports[0])
    finally:
        stop.set()
        thread.join()


def empty_database(folder: Path) -> str:
    """The URL of a store without tenants: SQLite in the folder, or the PostgreSQL database of POSTGRES_URL, emptied."""
    url = os.environ.get("POSTGRES_URL")
    if url is None:
        return f"sqlite:///{folder}/owner.db"
    engine = sa.create_engine(url)
    METADATA.drop_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))
    engine.dispose()
    return url


def until(true: Callable[[], bool], *, within_s: float) -> None:
    """Wait for something, and fail if it takes too long."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def random_ids(seed: int, lengths: Sequence[int], *, shared: int = 0) -> list[list[int]]:
    """Sequences of the given lengths without special tokens, the first `shared` ids of all being the same."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    prefix = torch.randint(3, VOCAB_SIZE, (shared,), generator=generator).tolist()
    return [(prefix + row)[: max(len(row), 1)] for row in rows]
