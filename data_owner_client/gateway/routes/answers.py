"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from data_owner_client.gateway.answers import AnswerWriter, Job
from data_owner_client.gateway.disconnection import ClientDisconnected, while_connected
from data_owner_client.gateway.echoes import echoes_of, scored_choices
from data_owner_client.gateway.generation import prepare_chat, prepare_completion, task_of
from data_owner_client.gateway.jobs import GenerationJob, JobEvent
from data_owner_client.gateway.label_job import LabelJob
from data_owner_client.gateway.openai.bodies import ChatCompletionBody, CompletionBody
from data_owner_client.gateway.openai.events import MEDIA_TYPE, server_sent_events
from data_owner_client.gateway.openai.requests import ChatRequest, GenerationSettings, chat_request, completion_request
from data_owner_client.gateway.openai.responses import AnswerHead
from data_owner_client.gateway.scoring import is_scoring
from data_owner_client.gateway.served_models import ServedModel
from data_owner_client.gateway.state import Gateway, gateway_of

router = APIRouter(tags=["answers"])

NOTE = "x-pema-note"
"""Header that says which part of a conversation has no effect."""
_ONLY_LAST_TURN = "This model answers the last message of the user alone. The other messages had no effect."
# nginx's status for a client that has hung up; nobody reads it.
_CLIENT_CLOSED_REQUEST = 499


@router.post("/chat/completions", summary="Answers to a conversation", response_model=None)
async def chat_completions(request: Request, body: ChatCompletionBody) -> Response:
    """Answers to a conversation, whole or as server-sent events.

    Raises:
        ApiError: the request cannot be honoured.
        PemaError: the owner's server refuses a call or is away.
    """
    return await _unless_disconnected(request, _chat(gateway_of(request), chat_request(body), time.perf_counter()))


@router.post("/completions", summary="Continuations of prompts", response_model=None)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continuations of prompts, whole or as server-sent events; or the log-probabilities of given texts.

    Raises:
        ApiError: the request cannot be honoured.
        PemaError: the owner's server refuses a call or is away.
    """
    return await _unless_disconnected(request, _completions(gateway_of(request), body, time.perf_counter()))


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    try:
        return await while_connected(request, work)
    except ClientDisconnected:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _chat(gateway: Gateway, request: ChatRequest, started: float) -> Response:
    model = gateway.models.get(request.model)
    task = task_of(gateway, model)
    job: Job
    if task.kind == "classify":
        job = LabelJob(gateway, model, task, request)
    else:
        job = GenerationJob(gateway.rounds, await asyncio.to_thread(prepare_chat, gateway, model, request))
    head = _head(gateway, model, request.settings, chat=True)
    headers = {NOTE: _ONLY_LAST_TURN} if task.kind != "chat" and request.has_other_turns else {}
    writer = AnswerWriter(head, gateway.plm.tokenizer, request.settings)
    return await _answered(gateway, model, job, writer, request.settings, headers, started)


async def _completions(gateway: Gateway, body: CompletionBody, started: float) -> Response:
    request = completion_request(body)
    model, settings = gateway.models.get(request.model), request.settings
    head = _head(gateway, model, settings, chat=False)
    if is_scoring(request):
        choices, usage = await scored_choices(gateway, model, request)
        gateway.metrics.count_tokens(model.name, prompt=usage.prompt_tokens, completion=usage.completion_tokens)
        return (
            _streamed(head.chunks_of(choices, usage), {})
            if settings.stream
            else JSONResponse(head.whole(choices, usage))
        )
    prepared = await asyncio.to_thread(prepare_completion, gateway, model, request)
    echoes = await echoes_of(gateway, model, request)
    writer = AnswerWriter(head, gateway.plm.tokenizer, settings, echoes)
    return await _answered(gateway, model, GenerationJob(gateway.rounds, prepared), writer, settings, {}, started)


def _head(gateway: Gateway, model: ServedModel, settings: GenerationSettings, *, chat: bool) -> AnswerHead:
    """The fields of all bodies of an answer. Nothing but model and request has a part in a text."""
    fingerprint = f"pema_{gateway.plm.card.digest[:8]}_{model.version[:8]}"
    return AnswerHead(model.name, chat, fingerprint, settings.include_usage)


async def _answered(
    gateway: Gateway,
    model: ServedModel,
    job: Job,
    writer: AnswerWriter,
    settings: GenerationSettings,
    headers: Mapping[str, str],
    started: float,
) -> Response:
    """The response with the answer of a job. A stream begins with the first event, so that errors have a status."""
    events = _counted(gateway, model, job, started)
    if not settings.stream:
        async with aclosing(events):
            return JSONResponse(await writer.whole(job, events), headers=dict(headers))
    first = await anext(events)
    return _streamed(writer.chunks(job, _behind(first, events)), headers)


def _streamed(chunks: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str]) -> Response:
    return StreamingResponse(server_sent_events(chunks), media_type=MEDIA_TYPE, headers=dict(headers))


async def _behind(first: JobEvent, events: AsyncGenerator[JobEvent]) -> AsyncGenerator[JobEvent]:
    """All events of a job, of which the first is there already."""
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


async def _counted(gateway: Gateway, model: ServedModel, job: Job, started: float) -> AsyncGenerator[JobEvent]:
    """The events of a job, which the gateway's metrics count."""
    is_first = True
    try:
        async with aclosing(job.events()) as events:
            async for event in events:
                if is_first:
                    gateway.metrics.observe_first_token(model.name, time.perf_counter() - started)
                    is_first = False
                yield event
    finally:
        usage = job.usage
        gateway.metrics.count_tokens(model.name, prompt=usage.prompt_tokens, completion=usage.completion_tokens)
