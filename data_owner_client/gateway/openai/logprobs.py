"""Log-probabilities of tokens in both of OpenAI's forms."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_owner_client.gateway.explanation import finite, token_bytes
from data_owner_client.plm.tokenizer import PlmTokenizer


@dataclass(frozen=True)
class LoggedToken:
    """A token with its log-probability.

    Attributes:
        text: text of the token; U+FFFD for bytes that are no whole character.
        utf8: bytes of its text; None for a token without text.
        logprob: log-probability under the mixture; None where there is none, as of a first token.
        top: the most probable tokens at its position, the most probable first; empty if none were wanted.
        listed: log-probability by which its own position lists it; None for `logprob`.
    """

    text: str
    utf8: bytes | None
    logprob: float | None
    top: tuple[LoggedToken, ...] = ()
    listed: float | None = None


def logged_token(
    tokenizer: PlmTokenizer, token: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()
) -> LoggedToken:
    """A token with its log-probability, and the most probable ones at its position."""
    utf8 = token_bytes(tokenizer, token)
    return LoggedToken(
        tokenizer.name(token),
        None if utf8 is None else bytes(utf8),
        logprob,
        tuple(logged_token(tokenizer, other, value) for other, value in top),
    )


def chat_logprobs(tokens: Sequence[LoggedToken]) -> dict[str, Any]:
    """The form of chat completions."""
    content = [{**_chat_token(token), "top_logprobs": [_chat_token(each) for each in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _chat_token(token: LoggedToken) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": finite(token.logprob or 0.0),
        "bytes": None if token.utf8 is None else list(token.utf8),
    }


class TextOffsets:
    """Counts the characters before each token of a growing text. A character counts where its last byte is.

    Args:
        start: characters before the first token.
    """

    def __init__(self, start: int = 0) -> None:
        self._next = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, tokens: Sequence[LoggedToken]) -> list[int]:
        """The characters before each of the next tokens."""
        offsets = list[int]()
        for token in tokens:
            offsets.append(self._next)
            self._next += len(token.text if token.utf8 is None else self._decoder.decode(token.utf8))
        return offsets


def completion_logprobs(tokens: Sequence[LoggedToken], offsets: TextOffsets) -> dict[str, Any]:
    """The form of completions: four lists of one length.

    Args:
        tokens: the next tokens of a text, in their order.
        offsets: the text's offsets.
    """
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets.of(tokens),
    }


def _top(token: LoggedToken) -> dict[str, float] | None:
    """The most probable tokens and the token itself, by name. Of two with one name, the more probable one counts."""
    if token.logprob is None:
        return None
    found = dict[str, float]()
    for each in (*token.top, token):
        value = finite((each.logprob or 0.0) if each.listed is None else each.listed)
        found[_name(each)] = max(value, found.get(_name(each), value))
    return found


def _name(token: LoggedToken) -> str:
    r"""The text of a token; bytes that are no text as `bytes:\xNN`, as OpenAI's own API writes them."""
    try:
        return token.text if token.utf8 is None else token.utf8.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.utf8 or b"")
