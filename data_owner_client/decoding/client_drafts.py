"""Drafts of the client: continuations of the last tokens, found in the sequence itself or in texts such as a memory.

The server checks all drafts in one forward pass: a draft costs a row and no step. The server sees every draft, also
rejected ones. Drafts from a memory disclose parts of its targets; drafts from a sequence's prompt disclose nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_CLIENT_DRAFTS = 6
"""Drafts of the client in one call."""
_ORDERS = (3, 2)  # matching tokens required, longest first
# Added to the count of a pattern: a pattern seen once may not happen again.
_DOUBT = 1.0
_CALIBRATION_WEIGHT = 8.0
# Probability that a match of this many tokens continues as before, until measured.
_COPY_PRIOR = {1: 0.15, 2: 0.4, 3: 0.6, 4: 0.75}


@dataclass(frozen=True)
class DraftToken:
    """One draft of the client.

    Attributes:
        token: token id.
        acceptance: probability that the mixture accepts it, if it accepts all drafts before.
        prior: evidence behind `acceptance`: a share of counts (`NgramDrafter`), or the number of matching tokens.
        drafter: the drafter, which observes whether the draft was accepted.
    """

    token: int
    acceptance: float
    prior: float
    drafter: Drafter


class Drafter(Protocol):
    """A source of drafts on the client."""

    def draft(self, prompt: Sequence[int], generated: Sequence[int], limit: int) -> list[DraftToken]:
        """Drafts of the next tokens, at most `limit`."""

    def observe(self, draft: DraftToken, *, accepted: bool) -> None:
        """Learn from one draft that the mixture accepted or rejected."""


class NgramDrafter:
    """Drafts by n-gram lookup in fixed texts.

    Args:
        texts: token ids, such as the targets of a memory. Every run of two or three tokens in them is indexed.
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

    def draft(self, prompt: Sequence[int], generated: Sequence[int], limit: int) -> list[DraftToken]:
        """The most frequent followers of the last two or three tokens generated, one after another."""
        ids, drafts = list(generated), list[DraftToken]()
        # Ratio of accepted drafts to those that the counts predict.
        calibration = (self._accepted + _CALIBRATION_WEIGHT) / (self._expected + _CALIBRATION_WEIGHT)
        while len(drafts) < min(limit, MAX_CLIENT_DRAFTS):
            follower = next((self._best[key] for key in _endings(ids) if key in self._best), None)
            if follower is None:
                break
            token, prior = follower
            drafts.append(DraftToken(token, min(1.0, prior * calibration), prior, self))
            ids.append(token)
        return drafts

    def observe(self, draft: DraftToken, *, accepted: bool) -> None:
        """Learn from one draft that the mixture accepted or rejected."""
        self._expected += draft.prior
        self._accepted += accepted


class PromptLookupDrafter:
    """Drafts by lookup in the sequence itself: its source, its examples and the tokens generated so far."""

    def __init__(self) -> None:
        self._drafted = dict.fromkeys(_COPY_PRIOR, 0)
        self._accepted = dict.fromkeys(_COPY_PRIOR, 0)

    def draft(self, prompt: Sequence[int], generated: Sequence[int], limit: int) -> list[DraftToken]:
        """The tokens after the last occurrence of the longest ending of the text, of up to four tokens."""
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
        copied = ids[follows : follows + min(limit, MAX_CLIENT_DRAFTS)] if longest else []
        return [self._draft_token(token, min(longest + step, 4)) for step, token in enumerate(copied)]

    def _draft_token(self, token: int, matching: int) -> DraftToken:
        accepted = self._accepted[matching] + _CALIBRATION_WEIGHT * _COPY_PRIOR[matching]
        return DraftToken(token, accepted / (self._drafted[matching] + _CALIBRATION_WEIGHT), matching, self)

    def observe(self, draft: DraftToken, *, accepted: bool) -> None:
        """Learn from one draft that the mixture accepted or rejected."""
        self._drafted[int(draft.prior)] += 1
        self._accepted[int(draft.prior)] += accepted


def _endings(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[-order:]) for order in _ORDERS if len(ids) >= order]
