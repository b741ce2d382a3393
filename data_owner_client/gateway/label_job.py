"""The answer of a `classify` task: its most probable label, which is scored and not generated."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from data_owner_client.data.tasks import Task
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.results import Generation
from data_owner_client.decoding.sequence import End
from data_owner_client.decoding.stats import CallCounts, GenerationStats
from data_owner_client.gateway.explanation import shown_to_owner
from data_owner_client.gateway.generation import mixture_of, refuse, source_of
from data_owner_client.gateway.jobs import JobEvent
from data_owner_client.gateway.openai.errors import ApiError, api_error
from data_owner_client.gateway.openai.requests import ChatRequest, GenerationSettings
from data_owner_client.gateway.openai.responses import Usage
from data_owner_client.gateway.served_models import ServedModel
from data_owner_client.gateway.state import Gateway
from protocol.errors import InvalidData, InvalidRequest, OverLimit


class LabelJob:
    """Scores the labels of one text in a thread.

    Args:
        gateway: the gateway.
        model: a model with a `classify` task.
        task: its task.
        request: the request. Its stops and its greatest length do not matter, as labels are answered whole.

    Raises:
        ApiError: the request asks for what scored labels do not have.
    """

    answers = 1

    def __init__(self, gateway: Gateway, model: ServedModel, task: Task, request: ChatRequest) -> None:
        _require_scorable(model, request.settings)
        self._gateway = gateway
        source, tokenizer = source_of(task, request), gateway.plm.tokenizer
        try:
            self._prompt_tokens = len(tokenizer.encode_prompt(task.prompt(source, tokenizer)))
        except (InvalidData, InvalidRequest) as error:
            raise api_error(error, "messages") from error
        self._score = partial(
            translate,
            gateway.plm,
            [source],
            adapter=model.adapter,
            task=task,
            interpolation=mixture_of(model, request.settings.pema),
            on_failure=refuse,
        )
        self._found: Generation | None = None

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt without retrieved examples, and of the label."""
        return Usage(self._prompt_tokens, len(self._found.token_ids[0]) if self._found else 0)

    def shown(self) -> dict[str, Any]:
        """Tokens, calls and bytes that the labels took, and the quotas that are left."""
        stats = self._found.stats if self._found else GenerationStats()
        counts = CallCounts(stats.calls, stats.label_tokens, stats.bytes_sent, stats.bytes_received)
        return shown_to_owner(counts, self._gateway.plm.rate_limits)

    async def events(self) -> AsyncGenerator[JobEvent]:
        """The label, with the probabilities of all.

        Raises:
            ApiError: the text is too long.
            PemaError: a call to the owner failed.
        """
        try:
            self._found = await self._gateway.workers.run(self._score)
        except (InvalidData, OverLimit) as error:
            raise api_error(error, "messages") from error
        probabilities = (self._found.label_probabilities or [{}])[0]
        yield JobEvent(0, self._found.texts[0], self._found.choices[0], End.STOP, probabilities)


def _require_scorable(model: ServedModel, settings: GenerationSettings) -> None:
    """Refuse settings of generated texts.

    Raises:
        ApiError: there is one.
    """
    unfit = {
        "temperature": settings.sampling is not None,
        "response_format": settings.form is not None,
        "pema.prefix": bool(settings.pema.prefix),
    }
    for name, is_given in unfit.items():
        if is_given:
            raise ApiError(
                400,
                f"{model.name} chooses among labels, which are scored and not generated. Leave {name} out.",
                code="unsupported_parameter",
                param=name,
            )
