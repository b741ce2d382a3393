"""The calls over HTTP. This module only translates: bodies to messages, answers to bodies, errors to problem+json."""

from __future__ import annotations

import asyncio
import json
import logging
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

from plm_owner_server import rest_docs
from plm_owner_server.accounts import answerable, request_id_of, timing_of
from plm_owner_server.connections import CERTIFICATE
from plm_owner_server.holder import Admission, ServiceHolder
from plm_owner_server.scheduler import Caller, Departed
from plm_owner_server.service import PlmService
from plm_owner_server.tenants import Scope
from plm_owner_server.threads import in_worker
from protocol.codec import BINARY, JSON, Message
from protocol.errors import (
    PROBLEM_JSON,
    InvalidRequest,
    MalformedMessage,
    PayloadTooLarge,
    PemaError,
    UnacceptableAnswer,
    Unauthenticated,
    UnknownEncoding,
    to_problem,
)
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadDtype, HeadRequest

log = logging.getLogger(__name__)

_Request = TypeVar("_Request", bound=Message)
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
REQUEST_ID = "X-Request-Id"
CLIENT_HEADER = "X-Pema-Client"
_CLIENT_LEFT = 499  # nginx's number for it; HTTP has none
_PROBES = frozenset({"/healthz", "/readyz"})


class _HeadRange(BaseModel):
    """The query of a range of head rows; unknown names are refused, as in bodies."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(default=0, ge=0, description="first row")
    stop: int | None = Field(
        default=None, ge=0, description="end of the range (exclusive); by default that of the head"
    )
    dtype: HeadDtype = "float16"


def create_app(
    holder: ServiceHolder, *, max_body_bytes: int, max_calls: int = 128, lifespan: Lifespan | None = None
) -> FastAPI:
    """The REST application.

    Args:
        holder: gives the service; its calls answer 503 until the model is loaded and warm.
        max_body_bytes: a larger body is refused while it is read, before it fills the memory.
        max_calls: calls worked on at the same time, those that wait for the model included.
        lifespan: what happens around the application's life, such as loading the model.
    """
    # More threads than calls may wait for the engine: the service must get to turn the next one away.
    limiter = CapacityLimiter(max_calls)
    app = FastAPI(title="PEMA PLM server", description=rest_docs.DESCRIPTION, version="1", lifespan=lifespan)

    async def admit(request: Request, scope: Scope) -> Admission:
        return await holder.admit(
            request.headers.get("authorization"), scope, getattr(request.state, CERTIFICATE, None)
        )

    async def answer(
        request: Request,
        scope: Scope,
        message_type: type[_Request],
        call: Callable[[PlmService, _Request, Caller], Message],
    ) -> Response:
        admitted = await admit(request, scope)
        form = _answer_form(request)
        _require_plain(request)
        body = await _body(request, max_body_bytes)
        caller = admitted.caller(request.headers.get(CLIENT_HEADER) or (request.client.host if request.client else ""))

        def work() -> Response:
            started = time.perf_counter()
            message = _parse(message_type, body, request.headers.get("content-type", ""))
            response = _response(call(admitted.service, message, caller), form)
            response.headers["Server-Timing"] = timing_of(caller, started).to_header()
            return response

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            caller.departed.set()

        watching = asyncio.create_task(watch())
        try:
            return await in_worker(work, limiter)
        finally:
            watching.cancel()

    @app.get("/healthz", tags=["probes"], summary="Is the process alive?", **rest_docs.HEALTHZ)
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", tags=["probes"], summary="Is the model loaded and warm?", **rest_docs.READYZ)
    async def readyz() -> dict[str, str]:
        return {"status": "ready", "model": holder.ready().model_card().name}

    @app.get("/v1/model", tags=["model"], summary="The model card", **rest_docs.MODEL)
    async def model_card(request: Request) -> Response:
        return Response((await admit(request, "card")).service.model_card().to_json(), media_type=JSON)

    @app.get("/v1/tokenizer", tags=["model"], summary="The fast tokenizer and the chat template", **rest_docs.TOKENIZER)
    async def tokenizer(request: Request) -> Response:
        bundle = (await admit(request, "card")).service.tokenizer()
        return _cached(request, bundle.digest) or Response(
            bundle.to_json(), media_type=JSON, headers={"ETag": f'"{bundle.digest}"'}
        )

    @app.get("/v1/lm-head", tags=["model"], summary="A range of rows of the LM head", **rest_docs.LM_HEAD_RANGE)
    async def lm_head_range(request: Request, rows: Annotated[_HeadRange, Query()]) -> Response:
        service, form = (await admit(request, "head")).service, _answer_form(request)
        tag = f"{service.model_card().digest}-{rows.start}-{rows.stop}-{rows.dtype}-{form.rpartition('.')[2]}"
        if cached := _cached(request, tag):
            return cached
        wanted = HeadRequest.validated(rows.model_dump())
        response = await in_worker(lambda: _response(service.lm_head(wanted), form), limiter)
        response.headers["ETag"] = f'"{tag}"'
        return response

    @app.post("/v1/lm-head", tags=["model"], summary="Chosen rows of the LM head", **rest_docs.LM_HEAD)
    async def lm_head(request: Request) -> Response:
        return await answer(request, "head", HeadRequest, lambda service, message, _: service.lm_head(message))

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
    async def log_and_identify(request: Request, call_next: Callable[[Request], Any]) -> Response:
        request.state.id = request_id_of(request.headers.get(REQUEST_ID, ""))
        started = time.perf_counter()
        try:
            response: Response = await call_next(request)
        except (ClientDisconnect, Departed):
            response = Response(status_code=_CLIENT_LEFT)  # for the log: nobody reads it
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a problem document
            response = _problem(request, answerable(error, request.state.id, request.url.path))
        response.headers[REQUEST_ID] = request.state.id
        elapsed_ms = 1000 * (time.perf_counter() - started)
        # Probes come every few seconds; a log of them hides everything else.
        log.log(
            logging.DEBUG if request.url.path in _PROBES else logging.INFO,
            "%s %s %s -> %d in %.0f ms",
            request.state.id,
            request.method,
            request.url.path,
            response.status_code,
            elapsed_ms,
        )
        return response

    @app.exception_handler(PemaError)
    async def pema_error(request: Request, error: PemaError) -> Response:
        return _problem(request, error)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        # Unknown paths and methods: Starlette's own words are safe, they quote nothing of the request.
        wrapped = InvalidRequest(f"{error.detail}.", hint="The calls are listed in the OpenAPI page (/docs).")
        return _problem(request, wrapped, status=error.status_code)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _problem(request, InvalidRequest(f"{place}: {first['msg']}.", hint="See the OpenAPI page (/docs)."))

    return app


def _require_plain(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        # A small body could become a large one.
        raise UnknownEncoding("The body is compressed.", hint="Send it as it is, without Content-Encoding.")


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
        f"The content type {kind[:80]!r} is not known." if kind else "The content type is missing.",
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
    raise UnacceptableAnswer("The Accept header admits no form of the answer.", hint=f"Accept {BINARY} or {JSON}.")


def _response(message: Message, form: str) -> Response:
    return Response(message.to_json() if form == JSON else message.to_bytes(), media_type=form)


def _cached(request: Request, digest: str) -> Response | None:
    etag = f'"{digest}"'
    return Response(status_code=304, headers={"ETag": etag}) if request.headers.get("if-none-match") == etag else None


def _problem(request: Request, error: PemaError, status: int | None = None) -> Response:
    error.request_id = getattr(request.state, "id", None)
    problem = to_problem(error)
    problem["status"] = status or error.http_status
    headers = {"Retry-After": str(round(error.retry_after_s))} if error.retry_after_s is not None else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(problem), problem["status"], headers, PROBLEM_JSON)
