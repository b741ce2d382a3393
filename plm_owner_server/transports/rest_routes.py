"""The calls over HTTP. This module only translates between HTTP and messages; the service applies the rules."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from plm_owner_server.admission.controller import AdmissionController
from plm_owner_server.operations.call_log import timing_of
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.service.worker_threads import run_in_worker
from plm_owner_server.tenants.scopes import Scope
from plm_owner_server.transports import openapi
from plm_owner_server.transports.calls import CARD, DECODE, DISTRIBUTION, ENCODE, HEAD, TOKENIZER, RequestCall
from plm_owner_server.transports.http_protocol import CERTIFICATE
from protocol.codec import BINARY, JSON, Message
from protocol.errors import MalformedMessage, NotAcceptable, PayloadTooLarge, UnsupportedMediaType
from protocol.messages import HeadRequest
from protocol.types import HeadDtype

HEALTHZ, READYZ = "/healthz", "/readyz"
router = APIRouter()


@dataclass(frozen=True)
class RestServer:
    """State of an application (`app.state.server`).

    Attributes:
        controller: admits calls.
        max_body_bytes: size of the largest body.
        limiter: limits the calls in progress.
    """

    controller: AdmissionController
    max_body_bytes: int
    limiter: CapacityLimiter


def server_of(request: Request) -> RestServer:
    """The state of a request's application."""
    server: RestServer = request.app.state.server
    return server


def _admitted(scope: Scope) -> Callable[[Request], Awaitable[PlmService]]:
    """A dependency that admits a call and returns the service."""

    async def admit(request: Request) -> PlmService:
        authorization = request.headers.get("authorization")
        certificate = getattr(request.state, CERTIFICATE, None)
        return await server_of(request).controller.admit(request.state.context, scope, authorization, certificate)

    return admit


class _HeadRange(BaseModel):
    """The query of a range of head rows. Unknown names are refused, as in bodies."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(default=0, ge=0, description="first row")
    stop: int | None = Field(
        default=None, ge=0, description="end of the range (exclusive); by default that of the head"
    )
    dtype: HeadDtype = "float16"


# Balancers also ask with a slash, and take a redirect for a failure.
@router.get(f"{HEALTHZ}/", include_in_schema=False)
@router.get(HEALTHZ, tags=["probes"], summary="Is the process alive?", **openapi.HEALTHZ)
async def healthz() -> dict[str, str]:
    """Answer while the process lives."""
    return {"status": "alive"}


@router.get(f"{READYZ}/", include_in_schema=False)
@router.get(READYZ, tags=["probes"], summary="Is the model loaded and warm?", **openapi.READYZ)
async def readyz(request: Request) -> dict[str, str]:
    """Answer while calls are answered.

    Raises:
        NotReady: the model is loading, or the server is stopping.
    """
    return {"status": "ready", "model": server_of(request).controller.state.ready().model_card().name}


@router.get(CARD.path, tags=["model"], summary="The model card", **openapi.MODEL)
async def model_card(request: Request, service: Annotated[PlmService, Depends(_admitted(CARD.scope))]) -> Response:
    """The model card, as JSON."""
    context: CallContext = request.state.context
    card = await run_in_worker(lambda: service.model_card(context), server_of(request).limiter)
    return Response(card.to_json(), media_type=JSON)


@router.get(TOKENIZER.path, tags=["model"], summary="The fast tokenizer and the chat template", **openapi.TOKENIZER)
async def tokenizer(request: Request, service: Annotated[PlmService, Depends(_admitted(TOKENIZER.scope))]) -> Response:
    """The tokenizer, as JSON, with its digest as ETag."""
    context: CallContext = request.state.context
    bundle = await run_in_worker(lambda: service.tokenizer(context), server_of(request).limiter)
    return _not_modified(request, bundle.digest) or Response(
        bundle.to_json(), media_type=JSON, headers={"ETag": f'"{bundle.digest}"'}
    )


@router.get(HEAD.path, tags=["model"], summary="A range of rows of the LM head", **openapi.LM_HEAD_RANGE)
async def lm_head_range(
    request: Request,
    service: Annotated[PlmService, Depends(_admitted(HEAD.scope))],
    rows: Annotated[_HeadRange, Query()],
) -> Response:
    """A range of rows of the LM head, with an ETag."""
    context: CallContext = request.state.context
    form, limiter = _answer_form(request), server_of(request).limiter
    # Not yet a call: a client does not pay for rows that it has cached.
    card = await run_in_worker(lambda: service.card_for(context), limiter)
    tag = f"{card.digest}-{rows.start}-{rows.stop}-{rows.dtype}-{form.rpartition('.')[2]}"
    if not_modified := _not_modified(request, tag):
        return not_modified
    message = HeadRequest.from_fields(rows.model_dump())
    response = await run_in_worker(lambda: _response(service.lm_head(message, context), form), limiter)
    response.headers["ETag"] = f'"{tag}"'
    return response


@router.post(HEAD.path, tags=["model"], summary="Chosen rows of the LM head", **openapi.LM_HEAD)
async def lm_head(request: Request, service: Annotated[PlmService, Depends(_admitted(HEAD.scope))]) -> Response:
    """Chosen rows of the LM head."""
    return await _answer(HEAD, request, service)


@router.post(ENCODE.path, tags=["inference"], summary="Context representations", **openapi.ENCODE)
async def encode(request: Request, service: Annotated[PlmService, Depends(_admitted(ENCODE.scope))]) -> Response:
    """Context representations of sequences."""
    return await _answer(ENCODE, request, service)


@router.post(DECODE.path, tags=["inference"], summary="The newest position and drafted ones", **openapi.DECODE)
async def decode(request: Request, service: Annotated[PlmService, Depends(_admitted(DECODE.scope))]) -> Response:
    """Positions of prefixes and of the tokens drafted after them."""
    return await _answer(DECODE, request, service)


@router.post(DISTRIBUTION.path, tags=["inference"], summary="Next-token distribution", **openapi.DISTRIBUTION)
async def distribution(
    request: Request, service: Annotated[PlmService, Depends(_admitted(DISTRIBUTION.scope))]
) -> Response:
    """The next-token distribution after a text."""
    return await _answer(DISTRIBUTION, request, service)


async def _answer(call: RequestCall, request: Request, service: PlmService) -> Response:
    """Read the request, answer it in a worker thread, and watch for the client's disconnection meanwhile."""
    context: CallContext = request.state.context
    server, form = server_of(request), _answer_form(request)
    _require_plain(request)
    body = await _body(request, server.max_body_bytes)

    def work() -> Response:
        started = time.perf_counter()
        message = _parse(call.request, body, request.headers.get("content-type", ""))
        response = _response(call.answer(service, message, context), form)
        response.headers["Server-Timing"] = timing_of(context.usage, started).to_header()
        return response

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        context.disconnected.set()

    watching = asyncio.create_task(watch())
    try:
        return await run_in_worker(work, server.limiter)
    finally:
        watching.cancel()


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


def _parse(message_type: type[Message], body: bytes, content_type: str) -> Message:
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
    """Media type of the answer: JSON only if the client accepts it and not the binary form.

    Raises:
        NotAcceptable: the client accepts neither.
    """
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


def _not_modified(request: Request, tag: str) -> Response | None:
    etag = f'"{tag}"'
    return Response(status_code=304, headers={"ETag": etag}) if request.headers.get("if-none-match") == etag else None
