"""The border between prompt and answer in token ids, for λ_t and for the tokens that the form `recent` sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from data_owner_client.adapter.card import CandidateDistribution
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.tasks.last_prompt import last_prompt
from data_owner_client.decoding.prompt_scores import TextToScore
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData


def text_to_score(
    tokenizer: PlmTokenizer,
    token_ids: Sequence[int],
    adapter: CandidateDistribution | None,
    interpolation: Interpolation,
    prompt_tokens: int | None = None,
) -> TextToScore:
    """The text with the border of its answer and the answer's expected length.

    Without a given border, the answer begins behind the last prompt of the adapter's task. A text without such a prompt
    is an answer as a whole, if λ is the same at every position.

    Args:
        tokenizer: the PLM's tokenizer.
        token_ids: ids of the text, one at least.
        adapter: the data owner's adapter; None for the PLM alone.
        interpolation: mixture of both.
        prompt_tokens: number of ids before the answer; None to find it.

    Raises:
        InvalidData: there are fewer tokens than the prompt has, or the border is needed and was not found.
    """
    if prompt_tokens is not None and prompt_tokens > len(token_ids):
        raise InvalidData(
            f"The prompt has {prompt_tokens} tokens, but the whole text has {len(token_ids)}.",
            hint="Give prompt_tokens without those of the answer.",
        )
    if adapter is None or interpolation.finished(0, 1.0):
        return TextToScore(token_ids, prompt_tokens or 0)
    searched = token_ids if prompt_tokens is None else token_ids[:prompt_tokens]
    pieces = [_piece(tokenizer, token) for token in searched]
    # Bytes that are no character come back as they were.
    text = b"".join(pieces).decode(errors="surrogateescape")
    found, length = last_prompt(adapter.card.task, text, tokenizer), adapter.card.mean_length
    if found is not None and prompt_tokens is not None and text[found.end :].strip():
        found = None
    if found is not None and found.source is not None:
        source = found.source.encode(errors="surrogateescape").decode(errors="replace")
        length = adapter.card.expected_length(tokenizer.count(source))
    if prompt_tokens is not None:
        return TextToScore(token_ids, prompt_tokens, length)
    if found is not None:
        end = len(text[: found.end].encode(errors="surrogateescape"))
        ends = accumulate(map(len, pieces))
        border = next((number for number, at in enumerate(ends, 1) if at >= end), len(token_ids))
        return TextToScore(token_ids, border, length)
    if interpolation.schedule == "constant" and interpolation.gate is None and not adapter.card.sees_recent_tokens:
        return TextToScore(token_ids, 0, length)
    raise InvalidData(
        "The text does not say where its answer begins, on which this adapter's λ or form depends.",
        hint="Give pema.prompt_tokens, write the prompt as the adapter's task does, or set pema.schedule to constant.",
    )


def _piece(tokenizer: PlmTokenizer, token: int) -> bytes:
    """Bytes of a token's text; of a special token, its spelling."""
    known = tokenizer.token_bytes[token] if token < len(tokenizer.token_bytes) else b""
    return tokenizer.name(token).encode() if known is None else known
