"""The target as the owner of the PLM sees it in a redacted memory, and its contexts for the tokens of the true target.

Surrogates are as long as what they replace. So a true token that begins at some character belongs to the context that
ends before this character of the target with surrogates. Where none of its tokens begins there, the context is the
longest one that ends before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, groupby

from data_owner_client.memory.alignment import AlignedContext
from data_owner_client.plm.tokenizer import PlmTokenizer


@dataclass(frozen=True)
class SurrogateTarget:
    """A target with surrogates.

    Attributes:
        token_ids: token ids of the target with surrogates, as the owner sees them.
        contexts: for each token of the true target, the context that stands for its own; `draft_index` is the number of
            tokens of this target in it.
    """

    token_ids: list[int]
    contexts: list[AlignedContext]

    @classmethod
    def align(cls, token_ids: list[int], target: list[int], tokenizer: PlmTokenizer) -> SurrogateTarget:
        """Choose a context for every token of the true target.

        A context matches if it ends at the same character and in the same token as the true one, or if both targets
        begin. It is reliable if, besides, the token behind it or the two before it are the same. So the rest of a
        redacted span is not reliable, nor is the first token behind it.

        Args:
            token_ids: token ids of the target with surrogates.
            target: token ids of the true target.
            tokenizer: their tokenizer.
        """
        contexts = list[AlignedContext]()
        for i, (k, is_same_place) in enumerate(_places(token_ids, target, tokenizer)):
            matches = is_same_place and target[i - 1 : i] == token_ids[max(0, k - 1) : k]
            goes_on = target[i] == token_ids[k] or target[max(0, i - 2) : i] == token_ids[max(0, k - 2) : k]
            contexts.append(AlignedContext(k, matches, matches and goes_on))
        return cls(token_ids, contexts)


def _places(token_ids: list[int], target: list[int], tokenizer: PlmTokenizer) -> list[tuple[int, bool]]:
    """The place in `token_ids` for each true token, and whether it is at the same character."""
    before = _common_beginning(token_ids, target)
    rest, true_rest = token_ids[before:], target[before:]
    behind = _common_beginning(rest[::-1], true_rest[::-1])
    starts = _numbered(tokenizer.starts(rest[: len(rest) - behind]))
    true_starts = _numbered(tokenizer.starts(true_rest[: len(true_rest) - behind]))
    places = [(k, True) for k in range(before)]
    for start in true_starts:
        k = max(0, bisect_right(starts, start) - 1)
        places.append((min(before + k, len(token_ids) - 1), starts[k : k + 1] == [start]))
    return places + [(len(token_ids) - k, True) for k in range(behind, 0, -1)]


def _common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _numbered(starts: list[int]) -> list[tuple[int, int]]:
    """The starts, with numbers that tell the tokens of one character apart; such tokens follow each other."""
    return [pair for start, same in groupby(starts) for pair in zip(same, count(), strict=False)]
