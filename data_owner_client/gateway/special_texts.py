"""Texts in which special tokens are spelled out, as tools of evaluation send and expect them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from data_owner_client.plm.tokenizer import PlmTokenizer, Prompt


def spelled_prompt(text: str, tokenizer: PlmTokenizer, *, with_special_tokens: bool) -> Prompt:
    """The prompt in which each spelling of a special token is that token.

    Args:
        text: text with special tokens spelled out.
        tokenizer: the model's tokenizer.
        with_special_tokens: whether the tokenizer adds its own, such as the start of a sequence.
    """
    pattern = _special_pattern(tokenizer)
    spans = tuple(match.span() for match in pattern.finditer(text)) if pattern else ()
    return Prompt(text, spans, with_special_tokens)


def spelled_text(token_ids: Sequence[int], tokenizer: PlmTokenizer) -> str:
    """The text of token ids, with special tokens spelled out."""
    spellings = {token_id: spelling for spelling, token_id in tokenizer.special_ids.items()}
    parts, has_text = list[str](), False
    for is_special, group in groupby(token_ids, spellings.__contains__):
        if is_special:
            parts.extend(spellings[token_id] for token_id in group)
        else:
            # Only a text's own beginning loses the space that some tokenizers put there.
            parts.append((tokenizer.decode_continuation if has_text else tokenizer.decode)([*group]))
            has_text = True
    return "".join(parts)


@lru_cache(maxsize=2)  # some models have thousands of special tokens
def _special_pattern(tokenizer: PlmTokenizer) -> re.Pattern[str] | None:
    spellings = sorted(tokenizer.special_ids, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spellings))) if spellings else None
