"""Echoed prompts of a request, scored in threads a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.decode_loop import PLM_ONLY
from data_owner_client.gateway.answers import Echo
from data_owner_client.gateway.generation import mixture_of
from data_owner_client.gateway.openai.errors import api_error
from data_owner_client.gateway.openai.requests import CompletionRequest
from data_owner_client.gateway.openai.responses import Choice, Usage
from data_owner_client.gateway.served_models import ServedModel
from data_owner_client.gateway.special_texts import spelled_text
from data_owner_client.gateway.state import Gateway
from protocol.errors import InvalidData, OverLimit

# Prompts that are scored before the gateway looks again whether the client is still there.
_AT_ONCE = 16


async def scored_choices(
    gateway: Gateway, model: ServedModel, request: CompletionRequest
) -> tuple[list[Choice], Usage]:
    """The choices of a request that only scores its prompts, and its tokens.

    Raises:
        ApiError: a prompt cannot be scored.
        PemaError: a call to the owner failed.
    """
    choices, usage, mixture = list[Choice](), Usage(0, 0), _mixture(model, request)
    gateway.rounds.require_room()  # an owner that has said when to come back is not asked before
    for part in _parts(request):
        try:
            found, tokens = await gateway.workers.run(partial(gateway.scorer.answer, part, model.adapter, mixture))
        except (InvalidData, OverLimit) as error:
            raise api_error(error, "prompt") from error
        choices += [replace(choice, index=len(choices) + choice.index) for choice in found]
        usage += tokens
    return choices, usage


async def echoes_of(gateway: Gateway, model: ServedModel, request: CompletionRequest) -> list[Echo]:
    """The prompts that come before the answers of a request; none if it wants none.

    Raises:
        ApiError: a prompt cannot be scored.
        PemaError: a call to the owner failed.
    """
    if not request.echo:
        return []
    if request.settings.logprobs is None:
        tokenizer = gateway.plm.tokenizer
        return [Echo(each if isinstance(each, str) else spelled_text(each, tokenizer)) for each in request.prompts]
    echoes = list[Echo]()
    for part in _parts(request):
        score = partial(gateway.scorer.echoes, part, model.adapter, _mixture(model, request))
        echoes += [Echo(prompt.text, prompt) for prompt in await gateway.workers.run(score)]
    return echoes


def _mixture(model: ServedModel, request: CompletionRequest) -> Interpolation:
    if model.adapter is None:
        return PLM_ONLY
    return mixture_of(model, request.settings.pema) or model.adapter.card.interpolation


def _parts(request: CompletionRequest) -> Iterator[CompletionRequest]:
    for start in range(0, len(request.prompts), _AT_ONCE):
        yield replace(request, prompts=request.prompts[start : start + _AT_ONCE])
