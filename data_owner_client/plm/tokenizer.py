"""Tokenising exactly as the PLM's owner does, with the owner's own tokenizer file and none of their code."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from protocol.errors import InvalidData, ProtocolViolation, Unsupported
from protocol.messages import TokenizerBundle

_BLOCK = 256
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
ChatMessages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A prompt as text.

    Attributes:
        text: everything before the target.
        with_special_tokens: whether the tokenizer adds its own (a chat template has written them already).
    """

    text: str
    with_special_tokens: bool = True


class PlmTokenizer:
    """The PLM's tokenizer and chat template.

    Raises:
        ProtocolViolation: the server sent no tokenizer.
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

    def encode_target(self, prompt: Prompt, prompt_ids: list[int], target: str) -> list[int]:
        """Token ids of a target behind its prompt, as the model itself would write them there.

        Prompt and target are tokenised together. Where a token would span the boundary, which generation can never
        produce, the target is tokenised alone.
        """
        joint = self._ids(prompt.text + target, prompt.with_special_tokens)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        return self._ids(target, with_special_tokens=False)

    def count(self, text: str) -> int:
        """Number of tokens of a bare text."""
        return len(self._ids(text, with_special_tokens=False))

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def _ids_containing(self, text: str) -> frozenset[int]:
        r"""All tokens whose own text contains `text`: in many vocabularies a newline hides in tokens such as `.\n`."""
        size = self._tokenizer.get_vocab_size()
        # Many tokens at once first, as one by one takes long; bytes that make no character together may do so alone.
        blocks = [list(range(start, min(start + _BLOCK, size))) for start in range(0, size, _BLOCK)]
        joint = self._tokenizer.decode_batch(blocks, skip_special_tokens=False)
        ids = [
            i for block, own in zip(blocks, joint, strict=True) if text in own or _NO_CHARACTER in own for i in block
        ]
        texts = self._tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        return frozenset(i for i, token in zip(ids, texts, strict=True) if text in token)

    def special_token(self, name: str) -> str:
        """A special token by its role, such as `eos_token`.

        Raises:
            Unsupported: the tokenizer has none.
        """
        try:
            return self._special_tokens[name]
        except KeyError:
            raise Unsupported(f"The model's tokenizer has no {name}.", hint="Give the task a `stop` text.") from None

    def special_token_id(self, name: str) -> int:
        """The id of a special token by its role."""
        token_id = self._tokenizer.token_to_id(self.special_token(name))
        if token_id is None:
            raise ProtocolViolation(f"The server's tokenizer does not know its own {name}.")
        return int(token_id)

    def render_chat(self, messages: ChatMessages) -> Prompt:
        """The prompt that the model's own chat template makes of a conversation.

        The template is foreign code: it runs in Jinja's sandbox.

        Raises:
            Unsupported: the model has no chat template.
            InvalidData: the template refuses these messages.
        """
        if self._chat_template is None:
            raise Unsupported("The model has no chat template.", hint='Give the task `format = "plain"`.')
        # The environment that transformers gives chat templates.
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
