"""Token ids of the prompts of completions, which are texts or ids."""

from __future__ import annotations

from collections.abc import Sequence

from data_owner_client.gateway.openai.errors import ApiError
from data_owner_client.gateway.special_texts import spelled_prompt
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData, InvalidRequest


def prompt_ids(plm: RemotePlm, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt, as `/tokenize` gives them without the tokenizer's own special tokens.

    Args:
        plm: the PLM.
        prompt: a text, in which special tokens may be spelled out, or token ids.

    Raises:
        ApiError: the model has no such token, or the text has none.
    """
    vocab_size = plm.card.vocab_size
    if not isinstance(prompt, str):
        if (largest := max(prompt)) >= vocab_size:
            raise ApiError(400, f"The model has {vocab_size:,} tokens, and none with id {largest}.", param="prompt")
        return list(prompt)
    try:
        ids = plm.tokenizer.encode_prompt(spelled_prompt(prompt, plm.tokenizer, with_special_tokens=False))
    except (InvalidData, InvalidRequest) as error:
        raise ApiError(400, str(error), param="prompt") from error
    if not ids:
        raise ApiError(400, "A prompt has no token.", param="prompt")
    return ids


def missing_start(tokenizer: PlmTokenizer, ids: Sequence[int]) -> list[int]:
    """The special tokens that the tokenizer puts before a text, where the ids do not begin with them."""
    leading = tokenizer.leading_ids
    return [] if list(ids[: len(leading)]) == leading else leading
