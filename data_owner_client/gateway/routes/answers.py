"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from data_owner_client.gateway.answers import AnswerWriter, Echo, Job
from data_owner_client.gateway.disconnection import ClientDisconnected, while_connected
from data_owner_client.gateway.echoes import echoes_of, scored_choices
from data_owner_client.gateway.generation import prepare_chat, prepare_completion, task_of
from data_owner_client.gateway.jobs import GenerationJob, JobEvent
from data_owner_client.gateway.label_job import LabelJob
from data_owner_client.gateway.openai.bodies import ChatCompletionBody, CompletionBody
from data_owner_client.gateway.openai.events import MEDIA_TYPE, server_sent_events
from data_owner_client.gateway.openai.requests import GenerationSettings, chat_request, completion_request
from data_owner_client.gateway.openai.responses import AnswerHead, Choice, Usage
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
    return await _unless_disconnected(request, _chat(gateway_of(request), body))


@router.post("/completions", summary="Continuations of prompts", response_model=None)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continuations of prompts, whole or as server-sent events; or the log-probabilities of given texts.

    Raises:
        ApiError: the request cannot be honoured.
        PemaError: the owner's server refuses a call or is away.
    """
    return await _unless_disconnected(request, _completions(gateway_of(request), body))


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    try:
        return await while_connected(request, work)
    except ClientDisconnected:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _chat(gateway: Gateway, body: ChatCompletionBody) -> Response:
    request = await asyncio.to_thread(chat_request, body)  # a large schema takes long
    call = _Call(gateway, gateway.models.get(request.model), request.settings, chat=True)
    task = task_of(gateway, call.model)
    job: Job
    if task.kind == "classify":
        job = await asyncio.to_thread(LabelJob, gateway, call.model, task, request)
    else:
        job = GenerationJob(gateway.rounds, await asyncio.to_thread(prepare_chat, gateway, call.model, request))
    ignores_turns = task.kind != "chat" and request.has_other_turns
    return await call.response(job, headers={NOTE: _ONLY_LAST_TURN} if ignores_turns else None)


async def _completions(gateway: Gateway, body: CompletionBody) -> Response:
    request = await asyncio.to_thread(completion_request, body)
    call = _Call(gateway, gateway.models.get(request.model), request.settings, chat=False)
    if is_scoring(request):
        return call.scored_response(*await scored_choices(gateway, call.model, request))
    prepared = await asyncio.to_thread(prepare_completion, gateway, call.model, request)
    echoes = await echoes_of(gateway, call.model, request)
    return await call.response(GenerationJob(gateway.rounds, prepared), echoes)


class _Call:
    """One call of an application.

    Args:
        gateway: the gateway.
        model: the model that answers.
        settings: settings of the request.
        chat: whether the call is a chat's.
    """

    def __init__(self, gateway: Gateway, model: ServedModel, settings: GenerationSettings, *, chat: bool) -> None:
        self.model = model
        self._gateway = gateway
        self._settings = settings
        # A text depends on the request, the owner's model and the version of the adapter alone.
        fingerprint = f"pema_{gateway.plm.card.digest[:8]}_{model.version[:8]}"
        self._head = AnswerHead(model.name, chat, fingerprint, settings.include_usage)
        self._started = time.perf_counter()

    async def response(self, job: Job, echoes: Sequence[Echo] = (), headers: dict[str, str] | None = None) -> Response:
        """The response with the answer of a job. A stream begins with its first event, so that errors have a status.

        Raises:
            ApiError: the request cannot be honoured.
            PemaError: the owner's server refuses a call or is away.
        """
        writer = AnswerWriter(self._head, self._gateway.plm.tokenizer, self._settings, echoes)
        events = self._counted(job)
        if not self._settings.stream:
            async with aclosing(events):
                return JSONResponse(await writer.whole(job, events), headers=headers)
        first = await anext(events)
        return _streamed(writer.chunks(job, _behind(first, events)), headers)

    def scored_response(self, choices: Sequence[Choice], usage: Usage) -> Response:
        """The response with scored prompts."""
        self._count(usage)
        if self._settings.stream:
            return _streamed(self._head.chunks_of(choices, usage))
        return JSONResponse(self._head.whole(choices, usage))

    async def _counted(self, job: Job) -> AsyncGenerator[JobEvent]:
        """The events of a job, which the gateway's metrics count."""
        is_first = True
        try:
            async with aclosing(job.events()) as events:
                async for event in events:
                    if is_first:
                        seconds = time.perf_counter() - self._started
                        self._gateway.metrics.observe_first_token(self.model.name, seconds)
                        is_first = False
                    yield event
        finally:
            self._count(job.usage)

    def _count(self, usage: Usage) -> None:
        self._gateway.metrics.count_tokens(
            self.model.name, prompt=usage.prompt_tokens, completion=usage.completion_tokens
        )


def _streamed(chunks: AsyncIterator[Mapping[str, Any]], headers: dict[str, str] | None = None) -> Response:
    return StreamingResponse(server_sent_events(chunks), media_type=MEDIA_TYPE, headers=headers)


async def _behind(first: JobEvent, events: AsyncGenerator[JobEvent]) -> AsyncGenerator[JobEvent]:
    """All events of a job, of which the first is there already."""
    async with aclosing(events):
        yield first
        async for event in events:
            yield event
