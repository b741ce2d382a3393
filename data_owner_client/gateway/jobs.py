"""The answers of one request, as they grow in the loop of rounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data_owner_client.decoding.decode_loop import continuation_of
from data_owner_client.decoding.preparation import PreparedTexts
from data_owner_client.decoding.sequence import End, SequenceState
from data_owner_client.decoding.stats import CallCounts
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.gateway.explanation import shown_to_owner
from data_owner_client.gateway.openai.responses import FinishReason, Usage
from data_owner_client.gateway.round_loop import RoundLoop
from protocol.errors import PemaError

FINISH_REASONS: dict[End, FinishReason] = {
    End.STOP: "stop",
    End.MAX_TOKENS: "length",
    End.LENGTH_BOUND: "length",
    End.REPETITION: "length",
}
"""OpenAI's word for each end of a text."""


@dataclass(frozen=True)
class JobEvent:
    """The growth of one answer.

    Attributes:
        choice: index of the answer among those of the request.
        text: text that has become final since the answer's last event.
        tokens: tokens that have become final since then.
        end: reason for the answer's end; None while it grows.
        labels: of a task with labels, the probability of each; None for a generated answer.
    """

    choice: int
    text: str
    tokens: Sequence[TokenChoice]
    end: End | None = None
    labels: Mapping[str, float] | None = None


@dataclass
class _Answer:
    """One growing answer, used in the event loop's thread alone.

    Attributes:
        sequence: its sequence.
        ids: ids of its final tokens.
        sent: number of characters that were passed on.
    """

    sequence: SequenceState
    ids: list[int] = field(default_factory=list)
    sent: int = 0


class GenerationJob:
    """Runs the sequences of one request in a loop of rounds.

    Args:
        rounds: the loop.
        prepared: the sequences.

    Raises:
        Overloaded: too many sequences wait, or the owner takes no calls.
    """

    def __init__(self, rounds: RoundLoop, prepared: PreparedTexts) -> None:
        self._rounds = rounds
        self._prepared = prepared
        self._answers = [self._begun(sequence) for sequence in prepared.sequences]
        self._events = asyncio.Queue[tuple[int, Sequence[TokenChoice], End | PemaError | None]]()
        self._loop = asyncio.get_running_loop()
        for number, sequence in enumerate(prepared.sequences):
            sequence.on_choices = partial(self._put, number, end=None)
        self._members = rounds.join(
            prepared.sequences, [partial(self._end, number) for number in range(len(prepared.sequences))]
        )

    def _begun(self, sequence: SequenceState) -> _Answer:
        """An answer that goes on behind its prefix, which is not passed on."""
        ids = sequence.generated
        text = self._prepared.text(sequence.rules.stops.settled_text(ids)) if ids else ""
        return _Answer(sequence, ids, len(text))

    @property
    def answers(self) -> int:
        """Number of the answers."""
        return len(self._answers)

    @property
    def usage(self) -> Usage:
        """Tokens of the prompts, each once, and of the answers so far, their stops included."""
        prompts = [sequences[0].prompt for _, sequences in self._prepared.groups()]
        given = len(self._prepared.options.prefix)
        return Usage(sum(map(len, prompts)), sum(answer.sequence.length - given for answer in self._answers))

    def shown(self) -> dict[str, Any]:
        """Tokens, calls and bytes that the owner was shown, in the form of the extension."""
        counts = sum((answer.sequence.calls for answer in self._answers), CallCounts())
        return shown_to_owner(counts, self._rounds.quotas)

    async def events(self) -> AsyncGenerator[JobEvent]:
        """The growth of all answers, until all have ended.

        Sequences leave the loop when the iterator is closed.

        Raises:
            PemaError: an answer could not be finished.
        """
        growing = len(self._answers)
        try:
            while growing:
                number, tokens, end = await self._events.get()
                if isinstance(end, PemaError):
                    raise end
                growing -= end is not None
                yield self._event(number, tokens, end)
        finally:
            for member in self._members:
                member.leave()

    def _event(self, number: int, tokens: Sequence[TokenChoice], end: End | None) -> JobEvent:
        answer = self._answers[number]
        answer.ids += [choice.token for choice in tokens]
        if end is None:
            text = answer.sequence.rules.stops.settled_text(answer.ids)
        else:
            text = continuation_of(answer.sequence).text
        text = self._prepared.text(text)
        news, answer.sent = text[answer.sent :], max(answer.sent, len(text))
        return JobEvent(number, news, tokens, end)

    def _end(self, number: int, error: PemaError | None) -> None:
        self._put(number, [], end=error or self._answers[number].sequence.end)

    def _put(self, number: int, tokens: Sequence[TokenChoice], *, end: End | PemaError | None) -> None:
        """Pass an event to the event loop; any thread may do so."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (number, tokens, end))
