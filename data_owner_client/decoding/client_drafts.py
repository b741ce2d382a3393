"""Drafts of the client's own: what followed, in texts that it has, the tokens that were written last.

The server checks all drafts in one forward pass, so they cost a row each and no step. It sees them, also those that are
wrong: drafts from a memory disclose pieces of its targets; those from a sequence's own prompt disclose nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

MOST_OFFERS = 6
"""Drafts of the client's own in one call."""
_ORDERS = (3, 2)  # tokens that must match, the more first
# Added to the number of times that a pattern was seen: what was seen once may not happen again.
_DOUBT = 1.0
_CALIBRATION_WEIGHT = 8.0
# How often a text goes on as it did before, when so many tokens are the same; until it is seen.
_COPY_PRIOR = {1: 0.15, 2: 0.4, 3: 0.6, 4: 0.75}


@dataclass(frozen=True)
class DraftToken:
    """A draft of the client's own.

    Attributes:
        token: its id.
        chance: that the mixture agrees with it, if it does with all drafts before.
        evidence: what its drafter based the chance on.
        drafter: learns what became of it.
    """

    token: int
    chance: float
    evidence: float
    drafter: Drafter


class Drafter(Protocol):
    """Where the client finds drafts."""

    def after(self, prompt: Sequence[int], generated: Sequence[int], most: int) -> list[DraftToken]:
        """Drafts for what comes next, `most` of them or fewer."""

    def learn(self, offer: DraftToken, *, agreed: bool) -> None:
        """One draft that was looked at."""


class NgramDrafter:
    """Continuations of the last few tokens in given texts.

    Args:
        texts: token ids, such as the targets of a memory. Every run of two or three tokens in them is kept.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ids in texts:
            for order in _ORDERS:
                for at in range(order, len(ids)):
                    followers[tuple(ids[at - order : at])][ids[at]] += 1
        self._best: dict[tuple[int, ...], tuple[int, float]] = {}
        for key, counts in followers.items():
            ((token, count),) = counts.most_common(1)
            self._best[key] = token, count / (counts.total() + _DOUBT)
        self._accepted = 0
        self._expected = 0.0

    def after(self, prompt: Sequence[int], generated: Sequence[int], most: int) -> list[DraftToken]:
        """What most often followed the last two or three tokens generated, and so on from there."""
        ids, offers = list(generated), list[DraftToken]()
        # How much oftener the mixture agrees than the counts say.
        calibration = (self._accepted + _CALIBRATION_WEIGHT) / (self._expected + _CALIBRATION_WEIGHT)
        while len(offers) < min(most, MOST_OFFERS):
            found = next((self._best[key] for key in _endings(ids) if key in self._best), None)
            if found is None:
                break
            token, evidence = found
            offers.append(DraftToken(token, min(1.0, evidence * calibration), evidence, self))
            ids.append(token)
        return offers

    def learn(self, offer: DraftToken, *, agreed: bool) -> None:
        """One draft that was looked at."""
        self._expected += offer.evidence
        self._accepted += agreed


class PromptLookupDrafter:
    """Continuations of the last few tokens in the sequence itself: its source, its examples, what was generated."""

    def __init__(self) -> None:
        self._offered = dict.fromkeys(_COPY_PRIOR, 0)
        self._accepted = dict.fromkeys(_COPY_PRIOR, 0)

    def after(self, prompt: Sequence[int], generated: Sequence[int], most: int) -> list[DraftToken]:
        """What followed the last place where the same tokens stood, the more of them the better."""
        ids = [*prompt, *generated]
        longest, follows = 0, 0
        # A match must end where something follows it, and begin with what was generated.
        for at in range(len(ids) - 1, 0, -1):
            matching = 0
            while matching < min(len(generated), 4, at) and ids[at - 1 - matching] == ids[-1 - matching]:
                matching += 1
            if matching > longest:
                longest, follows = matching, at
            if longest == min(len(generated), 4):
                break
        copied = ids[follows : follows + min(most, MOST_OFFERS)] if longest else []
        return [self._offer(token, min(longest + step, 4)) for step, token in enumerate(copied)]

    def _offer(self, token: int, matching: int) -> DraftToken:
        accepted = self._accepted[matching] + _CALIBRATION_WEIGHT * _COPY_PRIOR[matching]
        return DraftToken(token, accepted / (self._offered[matching] + _CALIBRATION_WEIGHT), matching, self)

    def learn(self, offer: DraftToken, *, agreed: bool) -> None:
        """One draft that was looked at."""
        self._offered[int(offer.evidence)] += 1
        self._accepted[int(offer.evidence)] += agreed


def _endings(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[-order:]) for order in _ORDERS if len(ids) >= order]
