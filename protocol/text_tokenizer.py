"""Texts to token ids and back, the same on both sides of the wire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from tokenizers import Tokenizer

from protocol.errors import InvalidRequest, ProtocolViolation
from protocol.marked_text import MarkedText
from protocol.messages import TokenizerBundle
from protocol.private_tokenizer import PrivateNames, make_private
from protocol.turn_tokens import TurnTokens

# SentencePiece writes a space as this character, and reads the character back as a space.
_SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"
# Characters that no text needs (Unicode's noncharacters). In UTF-8 they are as long as the space symbol.
_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Texts before which a text is tokenised as a continuation, the first that does not merge with it.
_ANCHORS = ("a", "\n", ".", "0", ")")


class TextTokenizer:
    """A tokenizer that reads no special token from a text, except where they are marked.

    What a user writes becomes text tokens, whatever it spells. Decoding gives the text back.

    Args:
        bundle: the tokenizer file and the special tokens.

    Attributes:
        special_ids: the id of each special token, by its spelling.

    Raises:
        ProtocolViolation: the tokenizer file cannot be read.
    """

    def __init__(self, bundle: TokenizerBundle) -> None:
        self._private, self._tokenizer = _load(bundle)
        self.special_ids = self._private.ids

    def encode(self, text: MarkedText, *, with_special_tokens: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: the text, with its special tokens marked.
            with_special_tokens: whether the tokenizer adds its own, such as the start of a sequence.

        Raises:
            InvalidRequest: the text has half of a surrogate pair, which is no character.
            ValueError: a marked span is not a special token.
        """
        _require_characters(text.text)
        stand_in = self._stand_in(text.text)
        private = "".join(
            self._private_name(part) if special else part.replace(_SPACE_SYMBOL, stand_in)
            for part, special in _parts(text)
        )
        ids: list[int] = self._tokenizer.encode(private, add_special_tokens=with_special_tokens).ids
        return ids if stand_in == _SPACE_SYMBOL else _replace(ids, self._bytes(stand_in), self._bytes(_SPACE_SYMBOL))

    def encode_continuation(self, text: MarkedText) -> list[int]:
        """Token ids of a text that follows another, none of which belongs to both.

        Raises:
            ValueError: a marked span is not a special token.
        """
        for anchor in map(MarkedText, _ANCHORS):
            before = self.encode(anchor, with_special_tokens=False)
            joint = self.encode(anchor + text, with_special_tokens=False)
            if joint[: len(before)] == before and self._represents(before, anchor.text):
                return joint[len(before) :]
        return self.encode(text, with_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """Text of token ids that follow others, its first space included."""
        anchor_ids, anchor = self._decoding_anchor
        return self.decode([*anchor_ids, *token_ids])[len(anchor) :]

    def decode_continuations(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sequence, as `decode_continuation` gives it."""
        anchor_ids, anchor = self._decoding_anchor
        texts = self._tokenizer.decode_batch([[*anchor_ids, *ids] for ids in sequences], skip_special_tokens=True)
        return [text[len(anchor) :] for text in texts]

    @property
    def size(self) -> int:
        """Number of tokens, with added ones."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def name(self, token_id: int) -> str:
        """Text of one token; a special token's spelling."""
        return self._spellings.get(token_id) or self.decode_continuation([token_id])

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None if there is no such token."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece

    def added_ids_from(self, size: int) -> list[int]:
        """Ids of the added tokens, from `size` on. Only texts that spell these tokens have them, or templates."""
        return sorted(token_id for token_id in self._private.added_ids if token_id >= size)

    def own_ids_from(self, size: int) -> list[int]:
        """Ids of the model's own tokens, from `size` on. Any text may have them."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return sorted(token_id for token_id in {*ids} - self._private.added_ids if token_id >= size)

    def _private_name(self, spelling: str) -> str:
        if len(spelling) == 1:
            return spelling
        try:
            return self._private.names[spelling]
        except KeyError:
            raise ValueError(f"{spelling!r} is marked, but is not a special token") from None

    @cached_property
    def _spellings(self) -> dict[int, str]:
        return {token_id: spelling for spelling, token_id in self.special_ids.items()}

    @cached_property
    def _decoding_anchor(self) -> tuple[list[int], str]:
        ids = self.encode(MarkedText(_ANCHORS[0]), with_special_tokens=False)
        return (ids, self.decode(ids)) if self._represents(ids, _ANCHORS[0]) else ([], "")

    def _represents(self, token_ids: Sequence[int], text: str) -> bool:
        """True if the ids are those of the text, perhaps with a space that the tokenizer puts before it."""
        return self.decode(token_ids) in (text, f" {text}")

    def _stand_in(self, text: str) -> str:
        """A character that is tokenised in the place of the space symbol; the symbol itself if there is no need."""
        if _SPACE_SYMBOL not in text:
            return _SPACE_SYMBOL
        return next((one for one in self._stand_ins if one not in text), _SPACE_SYMBOL)

    @cached_property
    def _stand_ins(self) -> list[str]:
        """Characters that become their three bytes, if the bytes of the space symbol are decoded to it."""
        symbol_ids = self._bytes(_SPACE_SYMBOL)
        if None in symbol_ids or self.decode_continuation([i for i in symbol_ids if i is not None]) != _SPACE_SYMBOL:
            return []
        encode = self._tokenizer.encode
        before, after = ([*encode(one, add_special_tokens=False).ids] for one in ("a", "b"))
        # The last of the ids of "b" are those of "b" alone, without a mark of a word's beginning.
        return [
            one
            for one in _STAND_INS
            if encode(f"a{one}b", add_special_tokens=False).ids == [*before, *self._bytes(one), after[-1]]
        ]

    def _bytes(self, character: str) -> list[int | None]:
        return [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]


def _load(bundle: TokenizerBundle) -> tuple[PrivateNames, Tokenizer]:
    try:
        tokenizer_json, private = make_private(
            bundle.tokenizer_json, bundle.special_tokens.values(), TurnTokens(bundle)
        )
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises bare Exception
        raise ProtocolViolation(
            "The server's tokenizer cannot be read.", hint="Update `tokenizers`; the model may be newer than it."
        ) from error
    if any(tokenizer.token_to_id(private.names[spelling]) != token_id for spelling, token_id in private.ids.items()):
        raise ProtocolViolation("The server's tokenizer gives its special tokens other ids than its file says.")
    return private, tokenizer


def _require_characters(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("A text has half of a surrogate pair.", hint="Write the whole character.") from error


def _parts(text: MarkedText) -> Iterator[tuple[str, bool]]:
    """The parts of a text, and whether each is a special token."""
    at = 0
    for start, end in text.special_spans:
        yield text.text[at:start], False
        yield text.text[start:end], True
        at = end
    yield text.text[at:], False


def _replace(ids: list[int], old: list[int | None], new: list[int | None]) -> list[int]:
    """Replace each run of ids by another of the same length."""
    replaced, at = list(ids), 0
    while at + len(old) <= len(ids):
        if ids[at : at + len(old)] == old:
            replaced[at : at + len(old)] = [i for i in new if i is not None]
            at += len(old)
        else:
            at += 1
    return replaced
