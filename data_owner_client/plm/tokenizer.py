"""The PLM's tokenizer and chat template, from the owner's files and without any of the owner's code."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import InvalidData, ProtocolViolation, Unsupported
from protocol.marked_text import MarkedText
from protocol.messages import TokenizerBundle
from protocol.text_tokenizer import TextTokenizer

__all__ = ["ChatMessages", "MarkedText", "PlmTokenizer", "Prompt"]

# Tokens that are decoded together in a search of the vocabulary.
_BLOCK_TOKENS = 256
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
ChatMessages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt(MarkedText):
    """A prompt: everything before the target.

    Attributes:
        with_special_tokens: whether the tokenizer adds its special tokens; False if a chat template has written them.
    """

    with_special_tokens: bool = True


class PlmTokenizer:
    """The PLM's tokenizer and chat template.

    Text is text, whatever it spells: special tokens come from marked spans and from the tokenizer's post-processor.

    Args:
        bundle: the tokenizer file, the chat template and the special tokens, as the server sends them.
        vocab_size: rows of the LM head, which may be fewer than the tokenizer has tokens; None to refuse no token.

    Raises:
        ProtocolViolation: the tokenizer file cannot be read.
    """

    def __init__(self, bundle: TokenizerBundle, vocab_size: int | None = None) -> None:
        self._tokenizer = TextTokenizer(bundle)
        self._vocab_size = vocab_size
        self._chat_template = bundle.chat_template
        self._special_tokens = bundle.special_tokens
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
        joint = self._tokenizer.encode(prompt + target, with_special_tokens=prompt.with_special_tokens)
        if joint[: len(prompt_ids)] == prompt_ids:
            return self._with_rows(joint[len(prompt_ids) :])
        return self._with_rows(self._tokenizer.encode_continuation(target))

    def count(self, text: str) -> int:
        """Number of tokens of a bare text."""
        return len(self._tokenizer.encode(MarkedText(text), with_special_tokens=False))

    def decode(self, token_ids: list[int]) -> str:
        """Text of the token ids of a whole sequence, without special tokens."""
        return self._tokenizer.decode(token_ids)

    def decode_continuation(self, token_ids: list[int]) -> str:
        """Text of token ids that follow others, without special tokens. A space at its beginning is kept."""
        return self._tokenizer.decode_continuation(token_ids)

    def change(self, text: str) -> str | None:
        """The text that a continuation becomes, if tokenising and decoding change it; None if they do not.

        Some tokenizers write all letters small, or have no token for some characters.
        """
        decoded = self.decode_continuation(self._tokenizer.encode_continuation(MarkedText(text)))
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
        spelled = {self._tokenizer.special_ids[text]} if text in self._tokenizer.special_ids else set()
        return frozenset(spelled).union(
            i for i, token in zip(ids, decode([[i] for i in ids]), strict=True) if text in token
        )

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Spellings of all special tokens."""
        return tuple(self._tokenizer.special_ids)

    def special_token(self, name: str) -> str:
        """The special token with this role, such as `eos_token`.

        Raises:
            Unsupported: the tokenizer has no such token.
        """
        try:
            return self._special_tokens[name]
        except KeyError:
            raise Unsupported(f"The model's tokenizer has no {name}.", hint="Give the task a `stop` text.") from None

    def special_token_id(self, name: str) -> int:
        """The id of the special token with this role.

        Raises:
            Unsupported: the tokenizer has no such token.
            ProtocolViolation: the token is not in the tokenizer's vocabulary.
        """
        try:
            return self._tokenizer.special_ids[self.special_token(name)]
        except KeyError:
            raise ProtocolViolation(f"The server's tokenizer does not contain its own {name}.") from None

    def render_chat(self, messages: ChatMessages) -> Prompt:
        """Render a conversation with the model's chat template.

        The template is untrusted code, so it runs in Jinja's sandbox.

        Raises:
            Unsupported: the model has no chat template.
            InvalidData: the template refuses these messages.
        """
        if self._chat_template is None:
            raise Unsupported("The model has no chat template.", hint='Give the task `format = "plain"`.')
        # The environment in which transformers renders chat templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            text = environment.from_string(self._chat_template).render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:
            raise InvalidData(
                f"The model's chat template refuses the task's messages: {error}", hint='Try `format = "plain"`.'
            ) from error
        return Prompt(text, with_special_tokens=False)

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


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
