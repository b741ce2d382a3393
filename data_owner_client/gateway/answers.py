"""Answers in OpenAI's form, whole or in chunks, from the growth of their texts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_owner_client.decoding.sequence import End
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.gateway.explanation import explain
from data_owner_client.gateway.jobs import FINISH_REASONS, JobEvent
from data_owner_client.gateway.openai.logprobs import (
    LoggedToken,
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    logged_token,
)
from data_owner_client.gateway.openai.requests import GenerationSettings
from data_owner_client.gateway.openai.responses import AnswerHead, Choice, Usage
from data_owner_client.gateway.scoring import EchoedPrompt
from data_owner_client.plm.tokenizer import PlmTokenizer


class Job(Protocol):
    """The work on one request."""

    @property
    def answers(self) -> int:
        """Number of its answers."""
        ...

    @property
    def usage(self) -> Usage:
        """Its tokens so far."""
        ...

    def shown(self) -> dict[str, Any]:
        """Tokens, calls and bytes that the owner was shown for it, in the form of the extension."""
        ...

    def events(self) -> AsyncGenerator[JobEvent]:
        """The growth of its answers, until all have ended."""
        ...


@dataclass(frozen=True)
class Echo:
    """A prompt before each of its answers.

    Attributes:
        text: its text.
        scored: its tokens with their scores; None where no log-probabilities are wanted.
    """

    text: str
    scored: EchoedPrompt | None = None


@dataclass
class _Answer:
    """One growing answer.

    Attributes:
        text: its text so far.
        tokens: its tokens so far.
        end: reason for its end; None while it grows.
        labels: probability of each label; None for a generated answer.
    """

    text: str = ""
    tokens: list[TokenChoice] = field(default_factory=list)
    end: End | None = None
    labels: Mapping[str, float] | None = None

    def add(self, event: JobEvent) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self.end, self.labels = event.end, event.labels


class AnswerWriter:
    """Writes the answers of one request.

    Args:
        head: fields that all bodies of the answer have.
        tokenizer: the model's tokenizer.
        settings: settings of the request.
        echoes: prompts that the answers begin with, in their order, each before `settings.n` answers; none for none.
    """

    def __init__(
        self, head: AnswerHead, tokenizer: PlmTokenizer, settings: GenerationSettings, echoes: Sequence[Echo] = ()
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._settings = settings
        self._echoes = echoes

    async def whole(self, job: Job, events: AsyncIterator[JobEvent]) -> dict[str, Any]:
        """The whole answer, when all texts have ended.

        Args:
            job: the work on the request.
            events: its events.

        Raises:
            PemaError: a text could not be finished.
        """
        answers = [_Answer() for _ in range(job.answers)]
        async for event in events:
            answers[event.choice].add(event)
        choices = [self._piece(index, answer, TextOffsets(), begins=True) for index, answer in enumerate(answers)]
        return self._head.whole(choices, job.usage, self._shown(job))

    async def chunks(self, job: Job, events: AsyncIterator[JobEvent]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer.

        Args:
            job: the work on the request.
            events: its events.

        Raises:
            PemaError: a text could not be finished.
        """
        if self._head.chat:
            for index in range(job.answers):
                yield self._head.role_chunk(index)
        offsets, growing = [TextOffsets() for _ in range(job.answers)], job.answers
        if self._echoes:
            for index in range(job.answers):
                echoed = self._piece(index, _Answer(), TextOffsets(), begins=True)
                offsets[index] = TextOffsets(len(echoed.text))
                yield self._head.text_chunk(echoed)
        async for event in events:
            if event.text or (event.tokens and self._shows_tokens):
                piece = _Answer(event.text, list(event.tokens), labels=event.labels)
                yield self._head.text_chunk(self._piece(event.choice, piece, offsets[event.choice]))
            if event.end is not None:
                growing -= 1
                shown = None if growing else self._shown(job)
                yield self._head.finish_chunk(event.choice, FINISH_REASONS[event.end], shown)
        if self._settings.include_usage:
            yield self._head.usage_chunk(job.usage)

    @property
    def _shows_tokens(self) -> bool:
        return self._settings.logprobs is not None or self._settings.pema.explain

    def _piece(self, index: int, answer: _Answer, offsets: TextOffsets, *, begins: bool = False) -> Choice:
        """A part of an answer.

        Args:
            index: number of the answer.
            answer: the part.
            offsets: offsets of its tokens; of tokens behind a scored echo, the echo's own.
            begins: whether its echo, if any, comes before it.
        """
        echo = self._echoes[index // self._settings.n] if begins and self._echoes else Echo("")
        pema = self._explained(answer) if self._settings.pema.explain else None
        reason = None if answer.end is None else FINISH_REASONS[answer.end]
        return Choice(index, echo.text + answer.text, reason, self._logprobs(answer.tokens, echo, offsets), pema)

    def _explained(self, answer: _Answer) -> dict[str, Any]:
        tokens = {"tokens": explain(self._tokenizer, answer.tokens)}
        return tokens if answer.labels is None else tokens | {"labels": answer.labels}

    def _logprobs(self, choices: Sequence[TokenChoice], echo: Echo, offsets: TextOffsets) -> dict[str, Any] | None:
        if self._settings.logprobs is None:
            return None
        tokens = [self._logged(choice) for choice in choices]
        if self._head.chat:
            return chat_logprobs(tokens)
        return echo.scored.logprobs(tokens) if echo.scored else completion_logprobs(tokens, offsets)

    def _logged(self, choice: TokenChoice) -> LoggedToken:
        found = choice.alternatives.mixture if choice.alternatives else []
        return logged_token(self._tokenizer, choice.token, choice.logprob, found[: self._settings.logprobs])

    def _shown(self, job: Job) -> dict[str, Any] | None:
        return {"shown": job.shown()} if self._settings.pema.explain else None
