"""Tokens that mark turns, which the tokenizers of some models do not call special."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cached_property

from protocol.chat_template import ChatTemplate
from protocol.errors import InvalidData
from protocol.messages import TokenizerBundle

_BRACKETED = re.compile(r"[^\w\s].*\w.*[^\w\s]")


class TurnTokens:
    """Tokens that mark turns in a model's chat templates, whether or not its tokenizer calls them special.

    They are those that a template writes around two turns, and does not look for in their texts.

    Args:
        bundle: the chat templates and the special tokens.
    """

    def __init__(self, bundle: TokenizerBundle) -> None:
        self._bundle = bundle

    @cached_property
    def _templates(self) -> list[tuple[str, str]]:
        """For each template, its text around two empty turns, and the text that it looks for. Made when needed.

        A template that refuses such turns marks none.
        """
        templates = []
        messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        for source in self._bundle.chat_templates.values():
            with suppress(InvalidData):
                template = ChatTemplate(source, self._bundle.special_tokens, ())
                written = template.render(messages, add_generation_prompt=False).text
                written += template.render(messages[:1], add_generation_prompt=True).text
                templates.append((written, template.sought_text))
        return templates

    def __contains__(self, token: object) -> bool:
        """True for a token in brackets of some kind that marks turns."""
        return (
            isinstance(token, str)
            and _BRACKETED.fullmatch(token) is not None
            and any(token in written and token not in sought for written, sought in self._templates)
        )
