"""Requests as sequences to generate: the model's task around them, and the options that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.pairs import Source
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.options import ChosenOptions
from data_owner_client.decoding.preparation import (
    PreparedTexts,
    prepare_answers,
    prepare_token_prompts,
    task_for,
)
from data_owner_client.decoding.sequence import PrefixEndsAnswer
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.gateway.explanation import EXPLAINED_ALTERNATIVES
from data_owner_client.gateway.openai.errors import ApiError, api_error
from data_owner_client.gateway.openai.requests import ChatRequest, CompletionRequest, GenerationSettings, PemaOptions
from data_owner_client.gateway.prompt_ids import missing_start, prompt_ids
from data_owner_client.gateway.served_models import ServedModel
from data_owner_client.gateway.state import Gateway
from protocol.errors import InvalidData, OverLimit, Unsupported

_CONVERSATION = Task(name="conversation", kind="chat")


def prepare_chat(gateway: Gateway, model: ServedModel, request: ChatRequest) -> PreparedTexts:
    """The answers to a conversation, as sequences to generate.

    Raises:
        ApiError: the conversation cannot be answered as it is wished.
        IdentityMismatch: the owner's server has another model than the adapter's.
    """
    _require_answerable(gateway, request.settings.n, "n")
    options = _options(gateway, model, request.settings)
    task = task_of(gateway, model)
    try:
        with _refused_for("messages"):
            return prepare_answers(gateway.plm, [source_of(task, request)], model.adapter, task, options)
    except Unsupported as error:
        message = f"{model.name} has no chat template. Use /v1/completions, or name an adapter."
        raise ApiError(400, message, code="unsupported", param="model") from error


def prepare_completion(gateway: Gateway, model: ServedModel, request: CompletionRequest) -> PreparedTexts:
    """The continuations of prompts, as sequences to generate.

    Raises:
        ApiError: the prompts cannot be continued as it is wished.
        IdentityMismatch: the owner's server has another model than the adapter's.
    """
    _require_answerable(gateway, len(request.prompts) * request.settings.n, "prompt")
    plm, options = gateway.plm, _options(gateway, model, request.settings)
    prompts = [prompt_ids(plm, prompt) for prompt in request.prompts]
    whole = [[*missing_start(plm.tokenizer, ids), *ids] for ids in prompts]
    with _refused_for("prompt"):
        return prepare_token_prompts(plm, whole, model.adapter, options)


def task_of(gateway: Gateway, model: ServedModel) -> Task:
    """The task around a model's questions: that of the adapter; of the PLM alone, its chat template."""
    return task_for(gateway.plm, None if model.adapter else _CONVERSATION, model.adapter)


def source_of(task: Task, request: ChatRequest) -> Source:
    """The conversation for a task of conversations, else the last text of the user.

    Raises:
        ApiError: the user has said nothing.
    """
    if task.kind == "chat":
        return request.conversation
    if not request.last_user_text.strip():
        raise ApiError(400, "The user's last message has no text.", param="messages")
    return request.last_user_text


def mixture_of(model: ServedModel, wanted: PemaOptions) -> Interpolation | None:
    """The mixture that a request asks for; None for the model's own.

    Raises:
        ApiError: the PLM alone has no mixture.
    """
    changes = {
        "schedule": wanted.schedule,
        "lambda_max": wanted.lambda_max,
        "length_reward": wanted.length_reward,
    }
    given = [name for name, value in changes.items() if value is not None]
    if model.adapter is None:
        if given and wanted.schedule != "none":
            raise ApiError(
                400, f"{model.name} has no adapter to mix with. Leave pema.{given[0]} out.", param=f"pema.{given[0]}"
            )
        return None
    if not given:
        return None
    return model.adapter.card.interpolation.changed(wanted.schedule, wanted.lambda_max, wanted.length_reward)


def _require_answerable(gateway: Gateway, answers: int, param: str) -> None:
    """Refuse a request for more answers than the loop of rounds takes at all.

    Raises:
        ApiError: there are too many.
    """
    most = gateway.settings.batch_size + gateway.settings.max_waiting
    if answers > most:
        raise ApiError(400, f"{answers:,} answers are too many for one request: ask for {most:,} at most.", param=param)


@contextmanager
def _refused_for(param: str) -> Iterator[None]:
    """Name the field at fault where texts cannot be answered."""
    try:
        yield
    except PrefixEndsAnswer as error:
        raise api_error(error, "pema.prefix") from error
    except (InvalidData, OverLimit) as error:
        raise api_error(error, param) from error


def _options(gateway: Gateway, model: ServedModel, settings: GenerationSettings) -> ChosenOptions:
    """The options of a generation.

    Raises:
        ApiError: the model cannot answer with these settings.
    """
    pema = settings.pema
    vocab_size = gateway.plm.card.vocab_size
    if pema.prefix and max(pema.prefix) >= vocab_size:
        raise ApiError(400, f"The model has {vocab_size:,} tokens: an id is too large.", param="pema.prefix")
    try:
        return ChosenOptions(
            interpolation=mixture_of(model, pema),
            decoding=DecodingSettings(
                max_new_tokens=settings.max_tokens,
                # A bound of plausible lengths knows the task's own answers alone.
                length_bound=False if settings.form else None,
            ),
            form=settings.form,
            stop=settings.stop,
            prefix=pema.prefix,
            alternatives=max(settings.logprobs or 0, EXPLAINED_ALTERNATIVES if pema.explain else 0),
            sampling=_sampling(gateway, model, settings.sampling),
            head=gateway.head,
            samples=settings.n,
            best=settings.n,
            on_failure=refuse,
        )
    except InvalidData as error:
        raise api_error(error) from error


def _sampling(gateway: Gateway, model: ServedModel, sampling: SamplingSettings | None) -> SamplingSettings | None:
    """The settings of sampling: from all tokens where the gateway has the LM head, else from the candidates.

    Raises:
        ApiError: there is nothing to draw from.
    """
    if sampling is None or gateway.head is not None:
        return sampling
    if model.adapter is None:
        raise ApiError(
            400,
            f"{model.name} alone has no candidates to draw from. Start the gateway with --full-head, or leave "
            "temperature and repetition_penalty out.",
            code="unsupported_value",
            param="temperature" if sampling.temperature else "repetition_penalty",
        )
    return replace(sampling, candidates_only=True)


def refuse(number: int, error: InvalidData) -> None:
    """Refuse a request for its text."""
    raise error
