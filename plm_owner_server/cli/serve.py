"""The command `pema-server`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import torch
import uvicorn
from fastapi import FastAPI

from plm_owner_server.admission.authentication import authenticator_for
from plm_owner_server.admission.client_certificates import certificate_authenticator_for
from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.model_files.sources import digest_folder, resolve
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.logs import redact_task_exceptions, set_up_logs, write_no_core_files
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
from protocol.errors import PemaError

log = logging.getLogger(__name__)

# The model's thread gives the interpreter away with every operation, and waits so long to have it back from a thread
# that serves a call. Python's own 5 ms would be half of a step.
_SWITCH_S = 2e-4


class Serve(ServerSettings):
    """Load a model and serve it over REST and gRPC.

    Every flag is also an environment variable, PEMA_<FLAG> (PEMA_MAX_SEQUENCES=64); a flag wins.

    Examples:
      pema-server serve                                    the embedded Gemma 3 270M on 127.0.0.1:8000
      pema-server serve --model smollm2-135m --port 9000   the other embedded model
      pema-server serve --model /models/llama --dtype bfloat16
      PEMA_MODEL=Qwen/Qwen3-0.6B pema-server serve --cr-kind ffn_output
      pema-server serve --model /models/llama-70b --engine vllm --tensor-parallel-size 8
    """

    def cli_cmd(self) -> None:
        """Run until stopped; exit status 1 if the model cannot be served, or not any more."""
        serve(self)


def load_service(settings: ServerSettings) -> PlmService:
    """Find, load and warm up the model.

    Raises:
        PemaError: it cannot be served, and why.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    files = resolve(settings.model, settings.cache_dir)
    engine = load_engine(files.folder, settings)
    service = PlmService(
        engine,
        load_tokenizer(files.folder),
        name=files.name,
        weights_digest=digest_folder(files.folder),
        settings=settings,
        master_secret=lambda: master_secret(settings),
    )
    # What waits is bounded by its answers: a representation for every token, in float32, until it is on the wire.
    most = settings.max_waiting_tokens * engine.info.hidden_size * 4 / 2**20
    log.info(
        "at most %d requests and %d tokens wait, for answers of at most %.0f MiB; %g MiB for known prefixes",
        settings.max_waiting_requests,
        settings.max_waiting_tokens,
        most,
        settings.prefix_cache_mib,
    )
    log.info("%s by %s in %s, CRs of kind %s", files.name, settings.engine, engine.info.dtype, settings.cr_kind)
    return service


def serve(settings: ServerSettings) -> None:
    """Serve until stopped. The port answers at once, `/readyz` says whether the model is loaded and works."""
    sys.setswitchinterval(_SWITCH_S)
    set_up_logs(settings.log_level, settings.log_format)
    write_no_core_files()
    certified = certificate_authenticator_for(settings)
    state = ServingState()
    controller = AdmissionController(state, None if certified else authenticator_for(settings), certified)
    certificate = None
    if settings.tls_certificate and settings.tls_key:
        certificate = Certificate(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    context = certificate.context() if certificate else None
    metrics = Metrics(state)
    traces = traces_from_environment()
    credentials = certificate.grpc_credentials() if certificate else None
    failures: list[PemaError] = []

    def give_up(error: PemaError) -> None:
        failures.append(error)
        server.should_exit = True

    def load() -> PlmService:
        service = load_service(settings)
        log.info("ready; the calls are described on /docs")
        return service

    supervisor = Supervisor(load, state, engine_timeout_s=settings.engine_timeout, give_up=give_up)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        redact_task_exceptions(asyncio.get_running_loop())
        async with AsyncExitStack() as stack:
            stack.callback(controller.close)  # the last of all: gRPC's calls end before
            try:
                if settings.metrics_port is not None:
                    state.recorder.observers.append(metrics.observe)
                    port = stack.enter_context(metrics.served(settings.metrics_host, settings.metrics_port))
                    log.info("metrics on http://%s:%d/metrics", settings.metrics_host, port)
                if traces is not None:
                    state.recorder.observers.append(traces.observe)
                    stack.callback(traces.close)
                port = await stack.enter_async_context(
                    serve_grpc(
                        controller,
                        settings.host,
                        grpc_port,
                        **bounds,
                        max_connections=settings.max_connections,
                        transfer_s=settings.transfer_timeout,
                        credentials=credentials,
                    )
                )
                if certificate and context:
                    bound_handshakes(asyncio.get_running_loop(), settings.transfer_timeout)
                    renewing = asyncio.create_task(certificate.keep_current(context))
                    stack.callback(renewing.cancel)
                how = "TLS" if certificate else "no TLS"
                log.info("gRPC on %s:%d, REST on port %d, %s", settings.host, port, settings.port, how)
                threading.Thread(target=supervisor.run, name="supervisor", daemon=True).start()
            except PemaError as error:
                give_up(error)
            except OSError as error:
                give_up(PemaError(str(error), hint="Choose another --grpc-port."))
            yield

    beside = settings.port + 1 if settings.port else 0
    grpc_port = beside if settings.grpc_port is None else settings.grpc_port
    bounds = {"max_body_bytes": settings.max_body_bytes, "max_calls": 2 * settings.max_waiting_requests}
    allow_open_files(2 * settings.max_connections)
    app = create_app(controller, **bounds, lifespan=lifespan)
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
    server = DrainingServer(config, state, settings.drain_timeout)
    try:
        server.run()
    except SystemExit:  # it has said why
        sys.exit(f"pema-server: cannot listen on port {settings.port} of {settings.host}. Choose another --port.")
    supervisor.stop()
    if supervisor.loading or (failures and isinstance(failures[0], EngineStuck)):
        # Its thread cannot be ended, and Python would wait for it, or crash over it.
        for failure in failures:
            print(f"pema-server: {failure}", file=sys.stderr, flush=True)
        os._exit(1 if failures else 0)
    if failures:
        sys.exit(f"pema-server: {failures[0]}")
