"""The PLM's tokenizer and chat template, from the owner's files and without any of the owner's code."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from protocol.errors import InvalidData, ProtocolViolation, Unsupported
from protocol.marked_text import MarkedText
from protocol.messages import TokenizerBundle

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

    Args:
        bundle: the tokenizer file, the chat template and the special tokens, as the server sends them.

    Raises:
        ProtocolViolation: the tokenizer file cannot be read.
    """

    def __init__(self, bundle: TokenizerBundle) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(bundle.tokenizer_json)
        except Exception as error:  # tokenizers raises bare Exception
            raise ProtocolViolation(
                "The server's tokenizer cannot be read.", hint="Update `tokenizers`; the model may be newer than it."
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._chat_template = bundle.chat_template
        self._special_tokens = bundle.special_tokens
        self.ids_containing = lru_cache(maxsize=8)(self._ids_containing)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        return self._ids(prompt.text, prompt.with_special_tokens)

    def encode_target(self, prompt: Prompt, prompt_ids: list[int], target: MarkedText) -> list[int]:
        """Token ids of a target after its prompt, as the model would generate them.

        Prompt and target are tokenised together. If a token would span the boundary, which generation cannot produce,
        the target is tokenised alone.

        Args:
            prompt: the prompt as text.
            prompt_ids: the prompt as token ids.
            target: the target as text.
        """
        joint = self._ids(prompt.text + target.text, prompt.with_special_tokens)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        return self._ids(target.text, with_special_tokens=False)

    def count(self, text: str) -> int:
        """Number of tokens of a bare text."""
        return len(self._ids(text, with_special_tokens=False))

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _ids_containing(self, text: str) -> frozenset[int]:
        r"""Ids of all tokens that contain `text`; many vocabularies have tokens such as `.\n`."""
        size = self._tokenizer.get_vocab_size()
        # Blocks first: decoding token by token is slow. Bytes that form no character in a block may form one alone.
        blocks = [list(range(start, min(start + _BLOCK_TOKENS, size))) for start in range(0, size, _BLOCK_TOKENS)]
        joint = self._tokenizer.decode_batch(blocks, skip_special_tokens=False)
        ids = [
            i
            for block, string in zip(blocks, joint, strict=True)
            if text in string or _NO_CHARACTER in string
            for i in block
        ]
        texts = self._tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        return frozenset(i for i, token in zip(ids, texts, strict=True) if text in token)

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
        token_id = self._tokenizer.token_to_id(self.special_token(name))
        if token_id is None:
            raise ProtocolViolation(f"The server's tokenizer does not contain its own {name}.")
        return int(token_id)

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

    def _ids(self, text: str, with_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=with_special_tokens).ids
        return ids


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
