"""The minutes that a call of `train` may take, and the work that fits into them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

MIN_TEXTS = 20
"""Fewer decoded texts than these do not tell policies apart."""

Wish = Literal["no", "if it fits", "always"]


class TimeBudget:
    """Seconds that work may take. Finished work of an interrupted call counts with the seconds that it took then.

    Args:
        seconds: length of the budget.
        clock: seconds of a monotonic clock.

    Attributes:
        seconds: length of the budget.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds = seconds
        self.clock = clock
        self._began = clock()

    @property
    def left(self) -> float:
        """Seconds that are left; negative if more were used."""
        return self.seconds - (self.clock() - self._began)

    def charge(self, seconds: float) -> None:
        """Count work of an earlier call, which this one only read."""
        self._began -= seconds


@dataclass(frozen=True)
class WorkCosts:
    """Seconds of each kind of work on this machine and this server, and tokens of which the owner may have a quota.

    Attributes:
        training: one training.
        retrieval: the likelihoods of the held-out texts behind retrieved examples.
        text: decoding of one held-out text behind the task's own examples.
        retrieved_text: decoding of one held-out text behind retrieved examples.
        text_tokens: tokens that the owner counts for decoding one held-out text behind the task's own examples.
    """

    training: float
    retrieval: float
    text: float
    retrieved_text: float
    text_tokens: float = 0.0

    def decoded_text(self, *, retrieval: bool) -> float:
        """Seconds of decoding one held-out text, behind retrieved examples or the task's own."""
        return self.retrieved_text if retrieval else self.text


@dataclass(frozen=True)
class WorkWishes:
    """Work that the settings and the memory allow.

    Attributes:
        trainings: trainings without which there is no adapter.
        search: whether there are other settings to try.
        retrieval: whether retrieved examples are tried.
        texts: held-out texts to decode with each policy, at most.
        policies: decoding policies to decode them with, at most.
    """

    trainings: int
    search: bool
    retrieval: Wish
    texts: int
    policies: int

    def fitting_texts(self, seconds: float, costs: WorkCosts, *, retrieval: bool) -> int:
        """Texts that can be decoded with all policies in some seconds; 0 if they would not tell policies apart.

        Args:
            seconds: time for all of them; none if negative.
            costs: costs of the work.
            retrieval: whether retrieved examples stand before each text.
        """
        text_seconds = self.policies * costs.decoded_text(retrieval=retrieval)
        texts = min(self.texts, math.floor(max(0.0, seconds) / max(text_seconds, 1e-9)))
        return texts if texts >= min(MIN_TEXTS, self.texts) else 0


@dataclass(frozen=True)
class WorkPlan:
    """The work that fits into a budget, most valuable first.

    Trainings come first. In translation, retrieved examples gained 4 chrF, and the choice of λ by decoded texts about
    one. The search for settings gained less, so it takes what is left (docs/results.md).

    Attributes:
        seconds: time for everything.
        used: part of it that was used before.
        wishes: all work that was possible.
        costs: seconds of each kind of work.
        retrieval: whether retrieved examples are tried.
        texts: held-out texts to decode with each policy; 0 for a choice by likelihood alone.
        search_seconds: time for the search for better settings; 0 for no search.
    """

    seconds: float
    used: float
    wishes: WorkWishes
    costs: WorkCosts
    retrieval: bool
    texts: int
    search_seconds: float

    @classmethod
    def within(cls, seconds: float, wishes: WorkWishes, costs: WorkCosts, *, used: float = 0.0) -> WorkPlan:
        """The plan for a budget.

        Args:
            seconds: time for everything.
            wishes: the possible work.
            costs: its costs.
            used: part of the time that was used before.
        """
        left = seconds - used - wishes.trainings * costs.training
        retrieval = wishes.retrieval == "always" or (wishes.retrieval == "if it fits" and costs.retrieval <= left)
        left -= costs.retrieval * retrieval
        texts = wishes.fitting_texts(left, costs, retrieval=retrieval)
        left -= texts * wishes.policies * costs.decoded_text(retrieval=retrieval)
        search_seconds = left if wishes.search and left >= costs.training else 0.0
        return cls(seconds, used, wishes, costs, retrieval, texts, search_seconds)

    @property
    def decoding_tokens(self) -> int:
        """Tokens that the owner counts for the decoded texts, at most; more behind retrieved examples."""
        return math.ceil(self.texts * self.wishes.policies * self.costs.text_tokens)

    @property
    def steps(self) -> list[str]:
        """The work with its duration, in words."""
        wishes, costs = self.wishes, self.costs
        steps = [f"{_trainings(wishes.trainings)} ({_minutes(wishes.trainings * costs.training)})"]
        if self.search_seconds:
            steps.append(f"a search for better settings ({_minutes(self.search_seconds)})")
        if self.retrieval:
            steps.append(f"likelihoods behind retrieved examples ({_minutes(costs.retrieval)})")
        if self.texts:
            seconds = _minutes(self._texts_seconds)
            policies = f" with up to {wishes.policies} policies" if wishes.policies > 1 else ""
            steps.append(f"{self.texts} held-out texts decoded{policies} ({seconds})")
        return steps

    @property
    def left_out(self) -> list[str]:
        """The work that does not fit, each with the minutes that would include it."""
        wishes, lines = self.wishes, list[str]()
        if wishes.retrieval == "if it fits" and not self.retrieval:
            lines.append(self._line("retrieved examples", lambda plan: plan.retrieval))
        if self.texts < wishes.texts:
            what = f"{wishes.texts} instead of {self.texts} decoded texts"
            if not self.texts:
                what = "a choice by decoded texts"
            enough = wishes.texts if self.texts else min(MIN_TEXTS, wishes.texts)
            lines.append(self._line(what, lambda plan: plan.texts >= enough))
        if wishes.search and not self.search_seconds:
            lines.append(self._line("a search for better settings", lambda plan: plan.search_seconds > 0))
        return lines

    def _line(self, what: str, includes: Callable[[WorkPlan], bool]) -> str:
        minutes = math.floor(self.seconds / 60) + 1
        while not includes(WorkPlan.within(60 * minutes, self.wishes, self.costs, used=self.used)):
            minutes += 1
        return f"{what} (included with --minutes {minutes})"

    @property
    def _texts_seconds(self) -> float:
        return self.texts * self.wishes.policies * self.costs.decoded_text(retrieval=self.retrieval)


def _trainings(count: int) -> str:
    return "a training" if count == 1 else f"{count} trainings"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
