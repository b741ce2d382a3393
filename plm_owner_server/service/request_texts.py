"""Texts of requests: their token ids, and the names of tokens in answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

from protocol.chat_template import ChatTemplate, choose_template
from protocol.errors import InvalidData, InvalidRequest, Unsupported
from protocol.marked_text import MarkedText
from protocol.messages import TokenizerBundle
from protocol.text_tokenizer import TextTokenizer

log = logging.getLogger(__name__)

_LISTED_TOKENS = 5


class RequestTexts:
    """Tokenises the texts of requests, and names tokens.

    Args:
        bundle: the tokenizer, as clients have it.
        vocab_size: V, the number of rows of the LM head.

    Raises:
        Unsupported: the LM head has no row for tokens that any text may have.
    """

    def __init__(self, bundle: TokenizerBundle, vocab_size: int) -> None:
        self._bundle = bundle
        self._tokenizer = TextTokenizer(bundle)
        self._vocab_size = vocab_size
        _check_head(self._tokenizer, vocab_size)

    def token_ids(self, text: MarkedText, *, with_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, of which only marked spans are special tokens.

        Raises:
            InvalidRequest: the LM head has no row for a token of the text.
        """
        ids = self._tokenizer.encode(text, with_special_tokens=with_special_tokens)
        if max(ids, default=0) >= self._vocab_size:
            raise InvalidRequest(
                f"The text holds a token for which the model's LM head has no row: it has {self._vocab_size}.",
                hint="Leave out texts that stand for images and the like.",
            )
        return ids

    def chat_token_ids(self, text: str) -> list[int]:
        """Token ids of a text as a user's turn of the model's chat template, up to where the answer begins.

        Raises:
            Unsupported: the model has no chat template, or one that leaves the text out.
            InvalidRequest: the template refuses the text, or the LM head has no row for a token.
        """
        if not self._bundle.chat_templates:
            raise Unsupported("The model has no chat template.", hint="Use the template 'plain'.")
        try:
            template = self._chat_template
            rendered = template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        except InvalidData as error:  # its message may hold the text
            raise InvalidRequest(
                "The model's chat template cannot be used for this text.", hint="Use the template 'plain'."
            ) from error
        if not template.takes_user_turn:
            raise Unsupported("The model's chat template leaves out the text.", hint="Use the template 'plain'.")
        return self.token_ids(rendered, with_special_tokens=False)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        source = choose_template(self._bundle.chat_templates, None, with_tools=False)
        return ChatTemplate(source, self._bundle.special_tokens, self._tokenizer.special_ids)

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; of special tokens, their spelling."""
        return [self._tokenizer.name(token_id) for token_id in token_ids]


def _check_head(tokenizer: TextTokenizer, rows: int) -> None:
    """Refuse a head that has no rows for common tokens, and warn of one that has none for added tokens."""
    if missing := tokenizer.own_ids_from(rows):
        raise Unsupported(
            f"The tokenizer has text tokens up to id {missing[-1]}, but the model's LM head has {rows} rows.",
            hint="Put the tokenizer that belongs to these weights into the model's folder.",
        )
    if added := tokenizer.added_ids_from(rows):
        log.warning(
            "the LM head has %d rows, and none for %d added tokens of the tokenizer: %s%s; no request may hold them",
            rows,
            len(added),
            ", ".join(map(tokenizer.name, added[:_LISTED_TOKENS])),
            ", …" if len(added) > _LISTED_TOKENS else "",
        )
