"""A model's chat template, rendered as transformers' `apply_chat_template` renders it.

The template is the owner's code, and the texts are a user's. Neither is trusted: the template runs in a sandbox, and a
text cannot become a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from datetime import date
from functools import cached_property
from itertools import count
from typing import Any

from jinja2 import nodes

from protocol.errors import InvalidData, Unsupported
from protocol.marked_text import MarkedText
from protocol.messages import DEFAULT_TEMPLATE
from protocol.printable import printable_line
from protocol.template_environment import TemplateEnvironment, render_within_bounds

TOOL_TEMPLATE = "tool_use"
"""Name of the chat template that transformers prefers where there are tools."""
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# A text that no template has a reason to change.
_TEXT = "Answer in one word."
# Characters of a template's own errors that are shown.
_LONGEST_REASON = 300
# The first code point of the planes for private use.
_FIRST_PRIVATE = 0xF0000

ChatMessage = Mapping[str, Any]


def choose_template(templates: Mapping[str, str], name: str | None, *, with_tools: bool) -> str:
    """The source of the template that transformers would choose.

    Args:
        templates: sources of the model's templates, by name.
        name: name of the template; None for the default, or the one for tools if there are tools.
        with_tools: whether the conversation has tools.

    Raises:
        Unsupported: the model has no chat template.
        InvalidData: the model has no template of this name, or several and no default.
    """
    if not templates:
        raise Unsupported(
            "The model has no chat template.",
            hint='Conversations of several turns need one. Give other tasks `format = "plain"`.',
        )
    if name is None:
        name = TOOL_TEMPLATE if with_tools and TOOL_TEMPLATE in templates else DEFAULT_TEMPLATE
    if name not in templates:
        raise InvalidData(
            f"The model has no chat template {name!r}.", hint=f"Set `template` of the task: {', '.join(templates)}."
        )
    return templates[name]


class ChatTemplate:
    """A chat template with its variables.

    Args:
        source: Jinja source of the template.
        special_tokens: the model's special tokens by role, such as `eos_token`, which the template may name.
        special_texts: spellings of all special tokens.
        tools: JSON schemas of the tools; None for no tools.
        arguments: further variables of the template.
        day: the day that the template's clock shows; None for the present moment.

    Raises:
        InvalidData: the source is not a Jinja template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        special_texts: Iterable[str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        day: date | None = None,
    ) -> None:
        self._special_tokens = special_tokens
        self._special_texts = _SpecialTexts(special_texts)
        self._tools = tools
        self._arguments = arguments or {}
        environment = TemplateEnvironment(day)
        try:
            self._tree = environment.parse(source)
            self._template = environment.from_string(source)
        except Exception as error:  # also of Python's own compiler, behind Jinja's
            raise InvalidData(
                f"The model's chat template cannot be read: {_reason(error)}", hint='Try `format = "plain"`.'
            ) from error

    def with_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """The template with other tools. Compiling it again would take longer than many renderings.

        Args:
            tools: JSON schemas of the tools; None for no tools.
        """
        other = copy(self)
        other._tools = tools
        for name in ("takes_system_turn", "takes_user_turn"):
            other.__dict__.pop(name, None)  # they may depend on the tools
        return other

    @cached_property
    def reads_clock(self) -> bool:
        """True if what the template writes may depend on the day."""
        return any(node.name == "strftime_now" for node in self._tree.find_all(nodes.Name))

    @cached_property
    def reads_tools(self) -> bool:
        """False if the template never looks at tools, so that a conversation loses them."""
        return any(node.name == "tools" for node in self._tree.find_all(nodes.Name))

    @cached_property
    def sought_text(self) -> str:
        """All text that the template compares others with, or gives to functions, one after another."""
        users = self._tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test))
        constants = (constant.value for user in users for constant in user.find_all(nodes.Const))
        return "\0".join(value for value in constants if isinstance(value, str))

    @cached_property
    def takes_system_turn(self) -> bool:
        """False if the template refuses a system turn, or leaves its text out."""
        return self._writes_first([{"role": "system", "content": _TEXT}, {"role": "user", "content": "Hello"}])

    @cached_property
    def takes_user_turn(self) -> bool:
        """False if the template leaves a user's text out. Some read only contents that are lists of parts."""
        return self._writes_first([{"role": "user", "content": _TEXT}])

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> MarkedText:
        """The conversation as the template writes it, with the special tokens that the template wrote.

        Special tokens that the texts spell are text. If that changes what the template writes, it is refused.

        Args:
            messages: turns with `role`, `content` and whatever else the template reads.
            add_generation_prompt: whether the beginning of the assistant's next turn follows.

        Raises:
            InvalidData: the template refuses the messages, or handles a special token that a text spells.
        """
        variables = {
            **self._special_tokens,
            "documents": None,
            **self._arguments,
            "tools": self._tools,
            "messages": [_message(each) for each in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(variables)
        written = {**self._arguments, "tools": self._tools, "messages": variables["messages"]}
        marks = _Marks(self._special_texts, written)
        # The template reads variables and fields of messages by their names.
        marked = marks.around_values(written)
        marked["messages"] = [marks.around_values(each) for each in written["messages"]]
        if marked == written:
            return MarkedText(text, self._special_texts.spans(text))
        rendered = marks.removed(self._run(variables | marked))
        if rendered.text != text:
            raise InvalidData(
                "The model's chat template changes a special token that the texts spell.",
                hint="Spell the token in another way in the texts.",
            )
        return rendered

    def _writes_first(self, messages: Sequence[ChatMessage]) -> bool:
        """True if the template writes the first text as it is."""
        try:
            return messages[0]["content"] in self.render(messages, add_generation_prompt=True).text
        except InvalidData:
            return False

    def _run(self, variables: Mapping[str, Any]) -> str:
        try:
            text = render_within_bounds(self._template, variables)
            text.encode()  # half of a surrogate pair is no text
            return text
        except Exception as error:  # the template is foreign code: it may raise anything
            raise InvalidData(
                f"The model's chat template refuses the messages: {_reason(error)}", hint='Try `format = "plain"`.'
            ) from error


class _SpecialTexts:
    """The spellings of special tokens, and where they stand in a text; where they overlap, the longest counts.

    Some models have thousands, which one regular expression would try one after another.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = frozenset(filter(None, texts))
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)
        self._first = re.compile(
            f"[{re.escape(''.join({text[0] for text in self._texts}))}]" if self._texts else "(?!)"
        )
        self._beginnings = {text[:end] for text in self._texts for end in range(1, len(text))}
        self._ends = {text[start:] for text in self._texts for start in range(1, len(text))}
        self._partial_lengths = range(1, max(self._lengths, default=1))

    def __contains__(self, text: str) -> bool:
        return text in self._texts

    def spans(self, text: str) -> tuple[tuple[int, int], ...]:
        """Start and end of each spelled token."""
        spans: list[tuple[int, int]] = []
        at = 0
        while first := self._first.search(text, at):
            at = first.start()
            candidates = (text[at : at + length] for length in self._lengths)
            if found := next((one for one in candidates if one in self._texts), ""):
                spans.append((at, at + len(found)))
            at += len(found) or 1
        return tuple(spans)

    def could_begin_with(self, text: str) -> bool:
        """True if a token may begin with the last characters of the text."""
        return any(text[-length:] in self._beginnings for length in self._partial_lengths)

    def could_end_with(self, text: str) -> bool:
        """True if a token may end with the first characters of the text."""
        return any(text[:length] in self._ends for length in self._partial_lengths)


class _Marks:
    """Characters that stand around each special token that a text spells, and at partial ones at a text's ends.

    The characters are ones that no text has. A pair encloses a spelled token. A single one keeps the end of a text
    from forming a token with what the template writes beside it.
    """

    def __init__(self, special: _SpecialTexts, data: object) -> None:
        self._special = special
        present = set(json.dumps(data, ensure_ascii=False))
        absent = (character for code in count(_FIRST_PRIVATE) if (character := chr(code)) not in present)
        self._open, self._close, self._edge = next(absent), next(absent), next(absent)

    def around(self, value: Any) -> Any:
        """The value with marks in each string, keys of dictionaries included: a template may write them as JSON."""
        if isinstance(value, str):
            return self._around_text(value)
        if isinstance(value, Mapping):
            return {self.around(key): self.around(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self.around, value))
        return value

    def around_values(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with marks in the strings of their values."""
        return {name: self.around(value) for name, value in fields.items()}

    def _around_text(self, text: str) -> str:
        pieces = [self._edge if self._special.could_end_with(text) else ""]
        at = 0
        for start, end in self._special.spans(text):
            pieces += [text[at:start], self._open, text[start:end], self._close]
            at = end
        return "".join([*pieces, text[at:], self._edge if self._special.could_begin_with(text) else ""])

    def removed(self, marked: str) -> MarkedText:
        """The text without marks, and the spans of its special tokens that no pair of marks encloses."""
        parts = re.split(f"([{self._open}{self._close}{self._edge}])", marked)
        pieces, marks = parts[::2], ["", *parts[1::2]]
        spans: list[tuple[int, int]] = []
        length = 0
        for mark, piece in zip(marks, pieces, strict=True):
            if mark != self._open or piece not in self._special:
                spans += [(start + length, end + length) for start, end in self._special.spans(piece)]
            length += len(piece)
        return MarkedText("".join(pieces), tuple(spans))


def _message(message: ChatMessage) -> dict[str, Any]:
    """A message as transformers passes it: without keys that are None, and reasoning under each of its names."""
    fields = {key: value for key, value in message.items() if value is not None}
    reasoning = next((fields[key] for key in _REASONING_FIELDS if key in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _reason(error: Exception) -> str:
    """The message of a template's error, which may hold any characters of template and texts."""
    return printable_line(error, _LONGEST_REASON) or type(error).__name__
