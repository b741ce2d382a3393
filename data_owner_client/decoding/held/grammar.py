"""Token masks of an answer's form: the tokens with which it can go on, from its beginning to its stop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.stops import Stops
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import Unsupported

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class AnswerGrammar:
    """The answers of one form, as the tokens of one tokenizer.

    Args:
        form: form of the answers.
        tokenizer: the PLM's tokenizer.
        stops: ends of an answer.
        vocab_size: rows of the LM head.

    Raises:
        InvalidData: the form has a part that decoding cannot be held to, or a stop could stand inside an answer.
        Unsupported: the tokenizer cannot write such an answer, or the form is too large.
    """

    def __init__(self, form: AnswerForm, tokenizer: PlmTokenizer, stops: Stops, vocab_size: int) -> None:
        from llguidance import LLMatcher

        form.require_supported()
        grammar = form.grammar(stops.texts)
        _require_writable(tokenizer, form.spelling, vocab_size)
        self._matcher = LLMatcher(_matcher_tokens(tokenizer, vocab_size), grammar, log_level=0)
        self._stop_ids = stops.ids
        self._sizes = min(vocab_size, len(tokenizer.token_bytes)), vocab_size
        _require_sound(self._matcher)

    def begin(self) -> AnswerState:
        """The state before an answer's first token."""
        return AnswerState(self._matcher.deep_copy(), self._stop_ids, self._sizes)


class AnswerState:
    """One growing answer.

    Args:
        matcher: state of the grammar.
        stop_ids: special tokens that end an answer.
        sizes: tokens that have a text and a row, and rows of the LM head.
    """

    def __init__(self, matcher: LLMatcher, stop_ids: frozenset[int], sizes: tuple[int, int]) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._sizes = sizes

    def allowed(self) -> Tensor:
        """True for each token with which the answer can go on, bool [V]; never all False.

        Raises:
            Unsupported: the grammar is too large to follow, or no token can follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        _require_sound(self._matcher)
        tokens, rows = self._sizes
        # In NumPy: torch divides even such small work among threads, and waits long for them where cores are busy.
        allowed_V = np.zeros(rows, np.bool_)
        allowed_V[:tokens] = np.unpackbits(bits, count=tokens, bitorder="little")
        # As text, a token that ends answers would end this one before it is whole.
        allowed_V[list(self._stop_ids)] = self._matcher.is_accepting()
        if not allowed_V.any():
            raise Unsupported(
                "The model's vocabulary has no token for what must follow in an answer.",
                hint="Change the schema or the choices, or decode with --no-hold.",
            )
        return torch.from_numpy(allowed_V)

    def allowed_along(self, drafts: Sequence[int]) -> list[Tensor | None]:
        """The allowed tokens now and behind each draft; None behind the first draft that is not allowed, or a stop."""
        along: list[Tensor | None] = [self.allowed()]
        consumed = 0
        for token in drafts:
            before = along[-1]
            if before is None or not before[token] or token in self._stop_ids:
                along.append(None)
                continue
            self._matcher.consume_token(token)
            consumed += 1
            along.append(self.allowed())
        self._matcher.rollback(consumed)
        return along

    def count_allowed(self, tokens: Sequence[int]) -> int:
        """Number of tokens with which the answer can go on, from the first; a special token that ends it not among."""
        count: int = self._matcher.validate_tokens(list(tokens))
        return count

    def append(self, token: int) -> None:
        """Go on with an allowed token.

        Raises:
            Unsupported: the grammar is too large to follow.
        """
        if token not in self._stop_ids:
            self._matcher.consume_token(token)
            _require_sound(self._matcher)

    def fork(self) -> AnswerState:
        """A copy that grows by itself."""
        return AnswerState(self._matcher.deep_copy(), self._stop_ids, self._sizes)


class _TokenTexts:
    """The tokens as llguidance reads them."""

    is_tokenizer_wrapper = True
    # It then adds a token behind the others; the stops are those of the answer's.
    eos_token_id = None
    bos_token_id = None

    def __init__(self, texts: Sequence[bytes | None]) -> None:
        self.special_token_ids = [token_id for token_id, text in enumerate(texts) if text is None]
        self.tokens = [b"%d" % token_id if text is None else text for token_id, text in enumerate(texts)]

    def __call__(self, text: bytes) -> list[int]:
        """No tokens: the grammars force none."""
        return []


@lru_cache(maxsize=4)
def _matcher_tokens(tokenizer: PlmTokenizer, vocab_size: int) -> LLTokenizer:
    """The tokenizer for llguidance. A large vocabulary takes it a second."""
    from llguidance import LLTokenizer

    return LLTokenizer(_TokenTexts(tokenizer.token_bytes[:vocab_size]))


def _require_writable(tokenizer: PlmTokenizer, characters: set[str], vocab_size: int) -> None:
    """Require a token for each character, or for each of its bytes.

    Raises:
        Unsupported: one is missing.
    """
    tokens = {*tokenizer.token_bytes[:vocab_size]}
    for character in sorted(characters):
        encoded = character.encode()
        if encoded not in tokens and not {bytes([byte]) for byte in encoded} <= tokens:
            raise Unsupported(
                f"The model's vocabulary has no token for {character!r}, which the answers' form needs.",
                hint="Change the form, or decode with --no-hold.",
            )


def _require_sound(matcher: LLMatcher) -> None:
    if matcher.is_error():
        detail = matcher.get_error().strip().splitlines()[0].rstrip(".")
        raise Unsupported(
            f"The form of the answers is too large to follow: {detail}.",
            hint="Simplify the schema, or decode with --no-hold.",
        )
