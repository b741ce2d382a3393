"""The PLM's tokenizer, from the owner's files and without any of the owner's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from data_owner_client.plm.byte_pieces import bytes_of_piece
from protocol.errors import InvalidData
from protocol.marked_text import MarkedText
from protocol.messages import TokenizerBundle
from protocol.text_tokenizer import TextTokenizer

__all__ = ["MarkedText", "PlmTokenizer", "Prompt"]

# Tokens that are decoded together in a search of the vocabulary.
_BLOCK_TOKENS = 256
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Prompt(MarkedText):
    """A prompt: everything before the target.

    Attributes:
        with_special_tokens: whether the tokenizer adds its special tokens; False if a chat template has written them.
    """

    with_special_tokens: bool = True

    def __add__(self, other: MarkedText) -> Prompt:
        whole = super().__add__(other)
        return Prompt(whole.text, whole.special_spans, self.with_special_tokens)


class PlmTokenizer:
    """The PLM's tokenizer, and the sources of its chat templates.

    Text is text, whatever it spells: special tokens come from marked spans and from the tokenizer's post-processor.

    Args:
        bundle: the tokenizer file, the chat templates and the special tokens, as the server sends them.
        vocab_size: rows of the LM head, which may be fewer than the tokenizer has tokens; None to refuse no token.

    Attributes:
        chat_templates: Jinja source of each chat template, by name.
        special_tokens: spelling of each special token that has a role, by role, such as `eos_token`.

    Raises:
        ProtocolViolation: the tokenizer file cannot be read.
    """

    def __init__(self, bundle: TokenizerBundle, vocab_size: int | None = None) -> None:
        self._tokenizer = TextTokenizer(bundle)
        self._vocab_size = vocab_size
        self.chat_templates: Mapping[str, str] = bundle.chat_templates
        self.special_tokens: Mapping[str, str] = bundle.special_tokens
        self.ids_containing = lru_cache(maxsize=8)(self._ids_containing)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InvalidData: the model has no row for a token of the prompt.
        """
        return self._with_rows(self._tokenizer.encode(prompt, with_special_tokens=prompt.with_special_tokens))

    def encode_target(self, prompt: Prompt, prompt_ids: list[int], target: MarkedText) -> list[int]:
        """Token ids of a target after its prompt, as the model would generate them.

        Prompt and target are tokenised together. If a token would span the boundary, which generation cannot produce,
        the target is tokenised as the continuation of other text.

        Args:
            prompt: the prompt as text.
            prompt_ids: the prompt as token ids.
            target: the target as text.

        Raises:
            InvalidData: the model has no row for a token of the target.
        """
        joint = self.joint_target(prompt, prompt_ids, target)
        return self._with_rows(self._tokenizer.encode_continuation(target)) if joint is None else joint

    def joint_target(self, prompt: Prompt, prompt_ids: list[int], target: MarkedText) -> list[int] | None:
        """Token ids of a target, where prompt and target are tokenised together; see `encode_target`.

        Returns:
            The ids behind those of the prompt; None if a token spans the boundary.

        Raises:
            InvalidData: the model has no row for a token of the target.
        """
        joint = self._tokenizer.encode(prompt + target, with_special_tokens=prompt.with_special_tokens)
        return self._with_rows(joint[len(prompt_ids) :]) if joint[: len(prompt_ids)] == prompt_ids else None

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows another, none of which belongs to both."""
        return self._tokenizer.encode_continuation(MarkedText(text))

    def starts(self, token_ids: list[int]) -> list[int]:
        """The character at which each token of a continuation begins; of tokens of one character, the same one."""
        # By bytes: some tokenizers decode no character of a run of byte tokens whose last character is not complete.
        pieces = [self.token_bytes[token_id] or b"" for token_id in token_ids]
        return [len(b"".join(pieces[:k]).decode(errors="ignore")) for k in range(len(pieces))]

    def count(self, text: str) -> int:
        """Number of tokens of a bare text."""
        return len(self._tokenizer.encode(MarkedText(text), with_special_tokens=False))

    def decode(self, token_ids: list[int]) -> str:
        """Text of the token ids of a whole sequence, without special tokens."""
        return self._tokenizer.decode(token_ids)

    def decode_continuation(self, token_ids: list[int]) -> str:
        """Text of token ids that follow others, without special tokens. A space at its beginning is kept."""
        return self._tokenizer.decode_continuation(token_ids)

    def name(self, token_id: int) -> str:
        """Text of one token, its first space included; of a special token, its spelling."""
        return self._tokenizer.name(token_id)

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """UTF-8 bytes of each token's text, possibly of a part of a character; None for tokens without text."""
        size, special = self._tokenizer.size, {*self.special_ids.values()}
        texts = self._tokenizer.decode_continuations([[token_id] for token_id in range(size)])
        return [
            None
            if token_id in special or not text
            else bytes_of_piece(self._tokenizer.piece(token_id) or text)
            if _NO_CHARACTER in text
            else text.encode()
            for token_id, text in enumerate(texts)
        ]

    def change(self, text: str) -> str | None:
        """The text that a continuation becomes, if tokenising and decoding change it; None if they do not.

        Some tokenizers write all letters small, or have no token for some characters.
        """
        decoded = self.decode_continuation(self.encode_continuation(text))
        return None if decoded == text else decoded

    def _ids_containing(self, text: str) -> frozenset[int]:
        r"""Ids of all tokens whose text contains `text`, such as `.\n`; and the special token that it spells."""
        size, decode = self._tokenizer.size, self._tokenizer.decode_continuations
        # Blocks first: decoding token by token is slow. Bytes that form no character in a block may form one alone.
        blocks = [list(range(start, min(start + _BLOCK_TOKENS, size))) for start in range(0, size, _BLOCK_TOKENS)]
        ids = [
            i
            for block, string in zip(blocks, decode(blocks), strict=True)
            if text in string or _NO_CHARACTER in string
            for i in block
        ]
        texts = decode([[i] for i in ids])
        containing = frozenset(i for i, token in zip(ids, texts, strict=True) if text in token)
        special_id = self.special_ids.get(text)
        return containing if special_id is None else containing | {special_id}

    @cached_property
    def leading_ids(self) -> list[int]:
        """Ids of the special tokens that the tokenizer puts before a text, such as the start of a sequence."""
        text = MarkedText("a")
        bare = self._tokenizer.encode(text, with_special_tokens=False)
        whole = self._tokenizer.encode(text, with_special_tokens=True)
        return whole[: whole.index(bare[0])] if bare else []

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The id of each special token, by its spelling."""
        return self._tokenizer.special_ids

    def _with_rows(self, token_ids: list[int]) -> list[int]:
        """The same ids, if the LM head has a row for each."""
        if self._vocab_size is not None and max(token_ids, default=0) >= self._vocab_size:
            token_id = max(token_ids)
            raise InvalidData(
                f"A text holds {self._tokenizer.name(token_id)!r}, which is token {token_id} of the tokenizer, but the "
                f"model's LM head has {self._vocab_size} rows.",
                hint="Write it otherwise; the model has never learned this token.",
            )
        return token_ids
