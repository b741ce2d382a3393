"""The process of `pema-server serve`: both transports around one service, with metrics, traces and a supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from plm_owner_server.admission.allowed_hosts import allowed_hosts_for, metrics_hosts_for
from plm_owner_server.admission.authentication import authenticator_for
from plm_owner_server.admission.client_certificates import certificate_authenticator_for
from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.model_files.digest import digest_folder
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.logs import logged_while, redact_task_exceptions, set_up_logs, write_no_core_files
from plm_owner_server.operations.metrics import Metrics
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.operations.shutdown import DrainingServer
from plm_owner_server.operations.supervisor import EngineStuck, Supervisor
from plm_owner_server.operations.tracing import traces_from_environment
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.master_secret import master_secret
from plm_owner_server.transports.grpc_server import serve_grpc
from plm_owner_server.transports.http_protocol import allow_open_files, bound_handshakes, bounded_http_protocol
from plm_owner_server.transports.rest_app import create_app
from plm_owner_server.transports.tls import Certificate
from protocol.cores import torch_threads
from protocol.errors import PemaError

log = logging.getLogger(__name__)

# The model's thread releases the interpreter in every operation, and waits this long for a thread that serves a call to
# give it back. Python's default of 5 ms would be half of a decoding step.
_SWITCH_INTERVAL_SECONDS = 2e-4


def serve(settings: ServerSettings) -> None:
    """Serve until stopped. The ports answer at once, while the model loads.

    Raises:
        PemaError: the server cannot start, or its engine has failed.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    set_up_logs(settings.log_level, settings.log_format)
    write_no_core_files()
    ServerProcess(settings).run()


def load_service(settings: ServerSettings) -> PlmService:
    """Find, load and warm up the model.

    Raises:
        PemaError: the model cannot be served.
    """
    threads = torch_threads(settings.threads)
    torch.set_num_threads(threads)
    log.info("CPU threads of torch: %d", threads)
    files = resolve(settings.model, settings.cache_dir, settings.revision)
    with logged_while(log, f"loading {files.name}"):
        engine = load_engine(files.folder, settings)
    service = PlmService(
        engine,
        load_tokenizer(files.folder),
        name=files.name,
        weights_digest=digest_folder(files.folder, settings.cache_dir),
        settings=settings,
        master_secret=lambda: master_secret(settings),
    )
    # Bound on the answers in memory: a float32 representation of every token that waits, until it is on the wire.
    answers_mib = settings.max_waiting_tokens * engine.info.hidden_size * 4 / 2**20
    log.info(
        "at most %d requests and %d tokens wait, for answers of at most %.0f MiB; %g MiB for cached prefixes",
        settings.max_waiting_requests,
        settings.max_waiting_tokens,
        answers_mib,
        settings.prefix_cache_mib,
    )
    log.info("%s by %s in %s, CRs of kind %s", files.name, settings.engine, engine.info.dtype, settings.cr_kind)
    return service


class ServerProcess:
    """Runs a server until it is stopped or its engine fails.

    Args:
        settings: settings of the server.

    Raises:
        PemaError: the settings do not go together, or a file or the tenants' database cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._state = ServingState()
        certificates = certificate_authenticator_for(settings)
        authenticator = None if certificates else authenticator_for(settings)
        self._controller = AdmissionController(self._state, authenticator, certificates, allowed_hosts_for(settings))
        self._certificate: Certificate | None = None
        if settings.tls_certificate and settings.tls_key:
            self._certificate = Certificate(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        self._tls_context = self._certificate.context() if self._certificate else None
        self._grpc_credentials = self._certificate.grpc_credentials() if self._certificate else None
        self._metrics = Metrics(self._state)
        self._traces = traces_from_environment()
        self._supervisor = Supervisor(
            self._load, self._state, engine_timeout_s=settings.engine_timeout, give_up=self._give_up
        )
        self._failure: PemaError | None = None
        self._server = self._build_server()

    def run(self) -> None:
        """Serve until stopped.

        Raises:
            PemaError: the server could not start, or its engine has failed.
        """
        allow_open_files(2 * self._settings.max_connections)
        try:
            self._server.run()
        except SystemExit:  # uvicorn has logged the reason
            self._failure = PemaError(
                f"cannot listen on port {self._settings.port} of {self._settings.host}.",
                hint="Choose another --port, or a --host that is an address of this machine.",
            )
        self._supervisor.stop()
        if self._supervisor.loading or isinstance(self._failure, EngineStuck):
            self._exit_at_once()
        if self._failure is not None:
            raise self._failure

    def _exit_at_once(self) -> None:
        """End the process without Python's cleanup, which would wait for the engine's thread, or crash over it."""
        if self._failure is not None:
            print(f"pema-server: {self._failure}", file=sys.stderr, flush=True)
        os._exit(0 if self._failure is None else 1)

    def _load(self) -> PlmService:
        service = load_service(self._settings)
        log.info("ready; the calls are described on /docs")
        return service

    def _give_up(self, failure: PemaError) -> None:
        self._failure = self._failure or failure
        self._server.should_exit = True

    def _build_server(self) -> DrainingServer:
        settings, context = self._settings, self._tls_context
        app = create_app(self._controller, **self._request_bounds(), lifespan=self._lifespan)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
            http=bounded_http_protocol(settings.max_connections, settings.transfer_timeout),
            ws="none",
            ssl_context_factory=(lambda *_: context) if context else None,
        )
        return DrainingServer(config, self._state, settings.drain_timeout)

    def _request_bounds(self) -> dict[str, Any]:
        return {
            "max_body_bytes": self._settings.max_body_bytes,
            "max_calls": 2 * self._settings.max_waiting_requests,
        }

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        redact_task_exceptions(asyncio.get_running_loop())
        async with AsyncExitStack() as stack:
            stack.callback(self._controller.close)  # runs last, after the calls over gRPC have ended
            try:
                self._start_observers(stack)
                await self._start_grpc(stack)
                self._start_certificate_renewal(stack)
                threading.Thread(target=self._supervisor.run, name="supervisor", daemon=True).start()
            except PemaError as error:
                self._give_up(error)
            except OSError as error:
                self._give_up(PemaError(str(error), hint="Choose another --grpc-port."))
            yield

    def _start_observers(self, stack: AsyncExitStack) -> None:
        """Start metrics and traces."""
        host, port = self._settings.metrics_host, self._settings.metrics_port
        observers = self._state.recorder.observers
        if port is not None:
            observers.append(self._metrics.observe)
            hosts = metrics_hosts_for(self._settings)
            port = stack.enter_context(self._metrics.served(host, port, check_host=hosts.check))
            log.info("metrics on http://%s:%d/metrics", host, port)
        if self._traces is not None:
            observers.append(self._traces.observe)
            stack.callback(self._traces.close)

    async def _start_grpc(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        next_port = settings.port + 1 if settings.port else 0
        port = await stack.enter_async_context(
            serve_grpc(
                self._controller,
                settings.host,
                next_port if settings.grpc_port is None else settings.grpc_port,
                **self._request_bounds(),
                max_connections=settings.max_connections,
                transfer_s=settings.transfer_timeout,
                credentials=self._grpc_credentials,
            )
        )
        security = "TLS" if self._certificate else "no TLS"
        log.info("gRPC on %s:%d, REST on port %d, %s", settings.host, port, settings.port, security)

    def _start_certificate_renewal(self, stack: AsyncExitStack) -> None:
        if self._certificate and self._tls_context:
            bound_handshakes(asyncio.get_running_loop(), self._settings.transfer_timeout)
            renewal = asyncio.create_task(self._certificate.keep_current(self._tls_context))
            stack.callback(renewal.cancel)
