"""Asking a model that schedules itself for hidden states, so that exactly the positions wanted come back.

Such a model, as vLLM is one, keeps what it computed for beginnings of texts, and leaves out the positions that it did
not compute again. How many there are is checked on every answer: what does not fit is asked for once more, from its
first token on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from plm_owner_server.engines.interface import EngineStats, PassKind
from protocol.errors import ServerFault

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HiddenStateQuery:
    """What the model is asked.

    Attributes:
        token_ids: a text.
        tenant: whose text it is.
        newest: only the last position is wanted.
        anew: every position is computed, also those of a known beginning.
    """

    token_ids: list[int]
    tenant: str
    newest: bool
    anew: bool


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What the model has computed.

    Attributes:
        token_ids: the text that was run.
        hidden_T_D: last hidden states of the positions from `known` on, or of the newest alone, on the CPU.
        known: number of tokens at the beginning that were not run, as they were known.
    """

    token_ids: list[int]
    hidden_T_D: Tensor
    known: int


@dataclass(frozen=True, eq=False)
class PositionRange:
    """Positions of one text.

    Attributes:
        token_ids: the text.
        start: the first position wanted; those after it are wanted, too.
        tenant: who asks; what is known of a text is known to its tenant alone.
    """

    token_ids: list[int]
    start: int
    tenant: str = ""

    @property
    def rows(self) -> int:
        """Number of positions wanted."""
        return len(self.token_ids) - self.start

    def question(self, block_tokens: int | None = None) -> HiddenStateQuery:
        """What the model is asked for them.

        Args:
            block_tokens: beginnings may be known in multiples of so many tokens; None if nothing may be known.
        """
        newest = self.rows == 1
        # A position that is wanted must not be among the known ones. Most often it is not; the answer tells.
        anew = block_tokens is None or not (newest or self.start >= block_tokens)
        return HiddenStateQuery(self.token_ids, self.tenant, newest=newest, anew=anew)

    def fits(self, answer: HiddenStates) -> bool:
        """Whether an answer has them, and is whole."""
        if self.rows == 1:
            return len(answer.hidden_T_D) == 1
        return len(answer.hidden_T_D) == len(self.token_ids) - answer.known >= self.rows


class PoolingModel(Protocol):
    """A model without its LM head.

    Attributes:
        block_tokens: beginnings are known in multiples of so many tokens.
    """

    block_tokens: int

    def answer(self, questions: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        """Answers to all questions, in their order; the model runs them together as it can."""

    def forget(self) -> bool:
        """Drop all that is known of texts; whether it could be dropped."""

    def is_alive(self) -> bool:
        """Whether it can still answer, as far as that can be told without a question."""


class PooledRunner:
    """Runs texts on a model that schedules itself.

    Args:
        model: runs them.
        forget_after_s: what is known of a text is dropped at most so long after it was computed.
        clock: seconds that go by.

    Attributes:
        counts: what it has done.
    """

    def __init__(
        self, model: PoolingModel, *, forget_after_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._forget_after_s = forget_after_s
        self._clock = clock
        self._known_since: float | None = None  # the oldest of what is known
        self._lock = threading.Lock()  # the model works, or forgets
        self.counts = EngineStats()

    def run(self, wanted: Sequence[PositionRange], kind: PassKind) -> tuple[list[HiddenStates], int]:
        """Answers with exactly the positions wanted, and the number of tokens that were run for them.

        Raises:
            ServerFault: the model gives other positions than it was asked for.
        """
        with self._lock:
            self._forget_if_due()
            self._known_since = self._clock() if self._known_since is None else self._known_since
            answers = self._model.answer([each.question(self._model.block_tokens) for each in wanted])
            ran = self._note(kind, answers)
            unfit = [i for i, answer in enumerate(answers) if not wanted[i].fits(answer)]
            if unfit:
                again = self._model.answer([wanted[i].question() for i in unfit])
                ran += self._note(kind, again)
                for i, answer in zip(unfit, again, strict=True):
                    answers[i] = answer
        if not all(each.fits(answer) for each, answer in zip(wanted, answers, strict=True)):
            raise ServerFault(
                "The model gave other positions than it was asked for.", hint="Report this to the owner; try again."
            )
        cut = [
            replace(answer, hidden_T_D=answer.hidden_T_D[-each.rows :])
            for each, answer in zip(wanted, answers, strict=True)
        ]
        return cut, ran

    def is_alive(self) -> bool:
        """Whether the model can still answer. Any thread may call it."""
        return self._model.is_alive()

    def forget_unused(self) -> None:
        """Drop what is known of texts, if it has been known for long. Any thread may call it."""
        # Who works at the moment sees to it next time.
        if self._lock.acquire(blocking=False):
            try:
                self._forget_if_due()
            except Exception as error:  # noqa: BLE001 - a model that is broken shows with the next call
                log.warning("what is known of texts could not be dropped: %s", type(error).__name__)
            finally:
                self._lock.release()

    def _forget_if_due(self) -> None:
        # All of it: the model does not tell what was last used when. It is computed once more, then.
        if self._known_since is None or self._clock() - self._known_since < self._forget_after_s:
            return
        if self._model.forget():
            self._known_since = None
        else:
            log.warning("what is known of texts could not be dropped yet; it is tried again")

    def _note(self, kind: PassKind, answers: Sequence[HiddenStates]) -> int:
        ran = sum(len(answer.token_ids) - answer.known for answer in answers)
        self.counts.note(kind, ran, ran)
        self.counts.known_tokens += sum(answer.known for answer in answers)
        return ran
