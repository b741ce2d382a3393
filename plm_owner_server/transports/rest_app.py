"""The calls over HTTP. This module only translates: bodies to messages, answers to bodies, errors to problem+json."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.operations.call_log import (
    CLIENT_DISCONNECTED,
    OTHER,
    PROBE,
    CallRecord,
    Transport,
    request_id_of,
    timing_of,
)
from plm_owner_server.operations.serving_state import shutting_down_error
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext, ClientDisconnected
from plm_owner_server.service.worker_threads import run_in_worker
from plm_owner_server.tenants.scopes import Scope
from plm_owner_server.transports import openapi as rest_docs
from plm_owner_server.transports.http_protocol import CERTIFICATE
from protocol.codec import BINARY, JSON, Message
from protocol.errors import (
    PROBLEM_JSON,
    InvalidRequest,
    MalformedMessage,
    NotAcceptable,
    PayloadTooLarge,
    PemaError,
    Unauthenticated,
    UnsupportedMediaType,
    to_problem,
)
from protocol.integrity import error_path
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from protocol.rate_limits import to_fields
from protocol.types import HeadDtype

_Request = TypeVar("_Request", bound=Message)
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
REQUEST_ID = "X-Request-Id"
CLIENT_HEADER = "X-Pema-Client"
_CLIENT_LEFT = 499  # nginx's number for it; HTTP has none
_CALLS = {
    "/healthz": PROBE,
    "/readyz": PROBE,
    "/v1/model": "card",
    "/v1/tokenizer": "tokenizer",
    "/v1/lm-head": "head",
    "/v1/encode": "encode",
    "/v1/decode": "decode",
    "/v1/next-token-distribution": "distribution",
}
# FastAPI's own would tell of paths, queries and exceptions, word for word.
_NO_TELEMETRY: dict[str, Any] = {
    "telemetry": {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class _HeadRange(BaseModel):
    """The query of a range of head rows; unknown names are refused, as in bodies."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(default=0, ge=0, description="first row")
    stop: int | None = Field(
        default=None, ge=0, description="end of the range (exclusive); by default that of the head"
    )
    dtype: HeadDtype = "float16"


def create_app(
    controller: AdmissionController, *, max_body_bytes: int, max_calls: int = 128, lifespan: Lifespan | None = None
) -> FastAPI:
    """The REST application.

    Args:
        controller: gives the service; its calls answer 503 until the model is loaded and warm.
        max_body_bytes: a larger body is refused while it is read, before it fills the memory.
        max_calls: calls worked on at the same time, those that wait for the model included.
        lifespan: what happens around the application's life, such as loading the model.
    """
    # More threads than calls may wait for the engine: the service must get to turn the next one away.
    limiter = CapacityLimiter(max_calls)
    app = FastAPI(
        title="PEMA PLM server", description=rest_docs.DESCRIPTION, version="1", lifespan=lifespan, **_NO_TELEMETRY
    )

    async def admit(request: Request, scope: Scope) -> tuple[PlmService, CallContext]:
        context: CallContext = request.state.context
        certificate = getattr(request.state, CERTIFICATE, None)
        return await controller.admit(context, scope, request.headers.get("authorization"), certificate), context

    async def answer(
        request: Request,
        scope: Scope,
        message_type: type[_Request],
        call: Callable[[PlmService, _Request, CallContext], Message],
    ) -> Response:
        service, context = await admit(request, scope)
        form = _answer_form(request)
        _require_plain(request)
        body = await _body(request, max_body_bytes)

        def work() -> Response:
            started = time.perf_counter()
            message = _parse(message_type, body, request.headers.get("content-type", ""))
            response = _response(call(service, message, context), form)
            response.headers["Server-Timing"] = timing_of(context.usage, started).to_header()
            return response

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            context.disconnected.set()

        watching = asyncio.create_task(watch())
        try:
            return await run_in_worker(work, limiter)
        finally:
            watching.cancel()

    @app.get("/healthz", tags=["probes"], summary="Is the process alive?", **rest_docs.HEALTHZ)
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", tags=["probes"], summary="Is the model loaded and warm?", **rest_docs.READYZ)
    async def readyz() -> dict[str, str]:
        return {"status": "ready", "model": controller.state.ready().model_card().name}

    @app.get("/v1/model", tags=["model"], summary="The model card", **rest_docs.MODEL)
    async def model_card(request: Request) -> Response:
        service, context = await admit(request, "card")
        card = await run_in_worker(lambda: service.model_card(context), limiter)
        return Response(card.to_json(), media_type=JSON)

    @app.get("/v1/tokenizer", tags=["model"], summary="The fast tokenizer and the chat template", **rest_docs.TOKENIZER)
    async def tokenizer(request: Request) -> Response:
        service, context = await admit(request, "card")
        bundle = await run_in_worker(lambda: service.tokenizer(context), limiter)
        return _cached(request, bundle.digest) or Response(
            bundle.to_json(), media_type=JSON, headers={"ETag": f'"{bundle.digest}"'}
        )

    @app.get("/v1/lm-head", tags=["model"], summary="A range of rows of the LM head", **rest_docs.LM_HEAD_RANGE)
    async def lm_head_range(request: Request, rows: Annotated[_HeadRange, Query()]) -> Response:
        service, context = await admit(request, "head")
        form = _answer_form(request)
        # Not yet a call: what is cached is not paid for.
        card = await run_in_worker(lambda: service.card_for(context), limiter)
        tag = f"{card.digest}-{rows.start}-{rows.stop}-{rows.dtype}-{form.rpartition('.')[2]}"
        if cached := _cached(request, tag):
            return cached
        wanted = HeadRequest.from_fields(rows.model_dump())
        response = await run_in_worker(lambda: _response(service.lm_head(wanted, context), form), limiter)
        response.headers["ETag"] = f'"{tag}"'
        return response

    @app.post("/v1/lm-head", tags=["model"], summary="Chosen rows of the LM head", **rest_docs.LM_HEAD)
    async def lm_head(request: Request) -> Response:
        return await answer(request, "head", HeadRequest, PlmService.lm_head)

    @app.post("/v1/encode", tags=["inference"], summary="Context representations", **rest_docs.ENCODE)
    async def encode(request: Request) -> Response:
        return await answer(request, "encode", EncodeRequest, PlmService.encode)

    @app.post("/v1/decode", tags=["inference"], summary="The newest position and drafted ones", **rest_docs.DECODE)
    async def decode(request: Request) -> Response:
        return await answer(request, "decode", DecodeRequest, PlmService.decode)

    @app.post(
        "/v1/next-token-distribution", tags=["inference"], summary="Next-token distribution", **rest_docs.DISTRIBUTION
    )
    async def distribution(request: Request) -> Response:
        return await answer(request, "distribution", DistributionRequest, PlmService.distribution)

    @app.middleware("http")
    async def identify_and_account(request: Request, call_next: Callable[[Request], Any]) -> Response:
        request_id = request_id_of(request.headers.get(REQUEST_ID, ""))
        call = CallRecord(*_call_name(request), request_id, request.headers.get("traceparent", ""))
        request.state.call = call
        request.state.context = context = CallContext(_client(request), usage=call.usage)
        with controller.state.at_work(), controller.state.recorder.record(call):
            try:
                response: Response = await call_next(request)
            except (ClientDisconnect, ClientDisconnected):
                call.outcome = CLIENT_DISCONNECTED
                response = Response(status_code=_CLIENT_LEFT)  # for the log: nobody reads it
            except asyncio.CancelledError:  # the server ends, and this call's body is still on its way
                response = _problem_response(request, shutting_down_error())
            except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a problem document
                response = _problem_response(request, error)
            call.status = str(response.status_code)
        response.headers[REQUEST_ID] = request_id
        response.headers.update(to_fields(context.meter.left))
        return response

    @app.exception_handler(ClientDisconnected)
    async def departed(request: Request, error: ClientDisconnected) -> Response:
        raise error  # nobody reads an answer

    @app.exception_handler(PemaError)
    async def pema_error(request: Request, error: PemaError) -> Response:
        return _problem_response(request, error)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        # Unknown paths and methods: Starlette's own words are safe, they quote nothing of the request.
        wrapped = InvalidRequest(f"{error.detail}.", hint="The calls are listed in the OpenAPI page (/docs).")
        return _problem_response(request, wrapped, status=error.status_code)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _problem_response(
            request,
            InvalidRequest(f"{error_path(first['loc'])}: {first['msg']}.", hint="See the OpenAPI page (/docs)."),
        )

    return app


def _client(request: Request) -> str:
    """What the client calls itself, or else its address."""
    return request.headers.get(CLIENT_HEADER) or (request.client.host if request.client else "")


def _require_plain(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        # A small body could become a large one.
        raise UnsupportedMediaType("The body is compressed.", hint="Send it as it is, without Content-Encoding.")


async def _body(request: Request, max_body_bytes: int) -> bytes:
    too_large = PayloadTooLarge(
        f"The body is larger than {max_body_bytes} bytes.", hint="Send fewer sequences in one request."
    )
    if int(request.headers.get("content-length", 0)) > max_body_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body_bytes:
            raise too_large
    return bytes(body)


def _parse(message_type: type[_Request], body: bytes, content_type: str) -> _Request:
    kind = content_type.split(";")[0].strip().lower()
    if kind == BINARY:
        return message_type.from_bytes(body)
    if kind == JSON:
        return message_type.from_json(body)
    raise MalformedMessage(
        "The content type is not known." if kind else "The content type is missing.",
        hint=f"Send {BINARY} or {JSON}.",
    )


def _answer_form(request: Request) -> str:
    """JSON only if it is asked for, and binary is not; checked before any work is done."""
    accept = request.headers.get("accept", "*/*").lower()
    if BINARY in accept:
        return BINARY
    if JSON in accept:
        return JSON
    if "*/*" in accept or "application/*" in accept:
        return BINARY
    raise NotAcceptable("The Accept header admits no form of the answer.", hint=f"Accept {BINARY} or {JSON}.")


def _response(message: Message, form: str) -> Response:
    return Response(message.to_json() if form == JSON else message.to_bytes(), media_type=form)


def _cached(request: Request, digest: str) -> Response | None:
    etag = f'"{digest}"'
    return Response(status_code=304, headers={"ETag": etag}) if request.headers.get("if-none-match") == etag else None


def _call_name(request: Request) -> tuple[str, Transport, str]:
    """The call, the transport, and the call in its words."""
    # Paths and methods that are not known may be any text of the client's.
    path = request.scope["path"]
    name = _CALLS.get(path, OTHER)
    method = request.method if request.method in _METHODS else "?"
    return name, "rest", f"{method} {path}" if name != OTHER else f"{method} no call"


def _call_of(request: Request) -> CallRecord:
    call: CallRecord = request.state.call
    return call


def _problem_response(request: Request, error: Exception, status: int | None = None) -> Response:
    told = _call_of(request).fail(error)
    problem = to_problem(told)
    problem["status"] = status or told.http_status
    headers = {"Retry-After": str(math.ceil(told.retry_after_s))} if told.retry_after_s is not None else {}
    if isinstance(told, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(problem), problem["status"], headers, PROBLEM_JSON)
