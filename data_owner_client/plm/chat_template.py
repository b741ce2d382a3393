"""A model's chat template, rendered as transformers' `apply_chat_template` renders it, in a sandbox.

The template is the owner's code, and the texts are the user's. Neither is trusted: the template cannot leave Jinja's
sandbox or run without end, and a text cannot become a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import date, datetime, time
from functools import cached_property, wraps
from itertools import count
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from data_owner_client.plm.tokenizer import DEFAULT_TEMPLATE, Prompt
from protocol.errors import InvalidData, Unsupported

TOOL_TEMPLATE = "tool_use"
"""Name of the chat template that transformers prefers where there are tools."""
_MAX_STEPS = 200_000
"""Loop iterations and calls of one rendering."""
_MAX_LENGTH = 1 << 24
"""Characters or items of one value, and characters of the result."""
_MAX_INTEGER_BITS = 10_000
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
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
        raise Unsupported("The model has no chat template.", hint='Give the task `format = "plain"`.')
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
        environment = _Environment(day)
        try:
            self._tree = environment.parse(source)
            self._template = environment.from_string(source)
        except Exception as error:  # also of Python's own compiler, behind Jinja's
            raise InvalidData(
                f"The model's chat template cannot be read: {_one_line(error)}", hint='Try `format = "plain"`.'
            ) from error

    @cached_property
    def reads_clock(self) -> bool:
        """True if what the template writes may depend on the day."""
        return any(node.name == "strftime_now" for node in self._tree.find_all(nodes.Name))

    @cached_property
    def takes_system_turn(self) -> bool:
        """False if the template refuses a system turn, or leaves its text out."""
        text = "Answer in one word."
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}]
        try:
            return text in self.render(messages, add_generation_prompt=True).text
        except InvalidData:
            return False

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> Prompt:
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
        marked = marks.around(written)
        if marked == written:
            return Prompt(text, self._special_texts.spans(text), with_special_tokens=False)
        prompt = marks.removed(self._run(variables | marked))
        if prompt.text != text:
            raise InvalidData(
                "The model's chat template changes a special token that the texts spell.",
                hint="Spell the token in another way in the texts.",
            )
        return prompt

    def _run(self, variables: Mapping[str, Any]) -> str:
        budget = _steps.set(count())
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                length += len(part)
                _require(length <= _MAX_LENGTH, "writes too long a text")
        except Exception as error:  # the template is foreign code: it may raise anything
            raise InvalidData(
                f"The model's chat template refuses the messages: {_one_line(error)}", hint='Try `format = "plain"`.'
            ) from error
        finally:
            _steps.reset(budget)
        return "".join(parts)


class _SpecialTexts:
    """The spellings of special tokens, and where they stand in a text; where they overlap, the longest counts."""

    def __init__(self, texts: Iterable[str]) -> None:
        ordered = sorted(filter(None, texts), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._beginnings = {text[:end] for text in ordered for end in range(1, len(text))}
        self._ends = {text[start:] for text in ordered for start in range(1, len(text))}
        self._partial_lengths = range(1, len(ordered[0]) if ordered else 1)

    def spans(self, text: str) -> tuple[tuple[int, int], ...]:
        """Start and end of each spelled token."""
        return tuple(match.span() for match in self.pattern.finditer(text))

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
        self._open, self._close = next(absent), next(absent)

    def around(self, value: Any) -> Any:
        """The value with marks in each string; the keys of dictionaries stay."""
        if isinstance(value, str):
            text = self._special.pattern.sub(rf"{self._open}\g<0>{self._close}", value)
            before = self._open if self._special.could_end_with(text) else ""
            return before + text + (self._close if self._special.could_begin_with(text) else "")
        if isinstance(value, Mapping):
            return {key: self.around(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self.around, value))
        return value

    def removed(self, marked: str) -> Prompt:
        """The text without marks, and the spans of its special tokens that no pair of marks encloses."""
        pattern = f"{self._open}({self._special.pattern.pattern}){self._close}|[{self._open}{self._close}]"
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        for number, piece in enumerate(re.split(pattern, marked)):
            if piece is None:  # a single mark
                continue
            if number % 2 == 0:  # not the inside of a pair
                spans += [(start + length, end + length) for start, end in self._special.spans(piece)]
            pieces.append(piece)
            length += len(piece)
        return Prompt("".join(pieces), tuple(spans), with_special_tokens=False)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with bounds on work and sizes."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, day: date | None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, LoopControlExtension])
        self.code_generator_class = _BoundedCode
        self.filters = {name: _with_bounded_result(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_template_error,
            "strftime_now": lambda form: _moment(day).strftime(form),
            "dict": _Dictionary(),
            "namespace": _GuardedNamespace,
        }

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template, as one step."""
        _spend_step()
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, unless it would be too large."""
        _require(_fits(operator, left, right), "makes too large a value")
        return _bounded(super().call_binop(context, operator, left, right))

    def bounded(self, value: Any) -> Any:
        """The value, unless it is too large."""
        return _bounded(value)

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each as one step."""
        for item in items:
            _spend_step()
            yield item


class _BoundedCode(CodeGenerator):
    """Python code of a template whose loops and concatenations keep to the environment's bounds."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = nodes.Call(nodes.EnvironmentAttribute("counted"), [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Concat(node, frame)
        self.write(")")


class _GenerationBlocks(Extension):
    """`{% generation %}` blocks, by which training code finds the assistant's tokens. They write their content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        """Read a block. It is a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return caller()


class _Dictionary:
    """`dict` of a template: its calls without its attributes, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _GuardedNamespace(Namespace):
    """`namespace` of a template, without names that Python reads by itself."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _require_public(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


_steps: ContextVar[Iterator[int]] = ContextVar("steps of the rendering")


def _spend_step() -> None:
    _require(next(_steps.get()) < _MAX_STEPS, "does not come to an end")


def _bounded(value: Any) -> Any:
    _require(not isinstance(value, str | list | tuple | dict) or len(value) <= _MAX_LENGTH, "makes too large a value")
    return value


def _fits(operator: str, left: Any, right: Any) -> bool:
    """False if a product or power is too large to be computed."""
    if isinstance(left, int) and isinstance(right, int):
        exponent = right if operator == "**" else 1
        return max(left.bit_length() * exponent, right.bit_length()) <= _MAX_INTEGER_BITS
    if operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        count, sequence = (left, right) if isinstance(left, int) else (right, left)
        return not isinstance(sequence, str | bytes | list | tuple) or len(sequence) * count <= _MAX_LENGTH
    return True


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise SecurityError(f"it {fault}")


def _require_public(name: object) -> None:
    _require(not (isinstance(name, str) and name.startswith("_")), f"uses the name {name!r}")


def _with_bounded_result(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        return _bounded(function(*args, **kwargs))

    return bounded


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML, as transformers writes it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_template_error(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _moment(day: date | None) -> datetime:
    return datetime.now() if day is None else datetime.combine(day, time())


def _message(message: ChatMessage) -> dict[str, Any]:
    """A message as transformers passes it: without keys that are None, and reasoning under each of its names."""
    fields = {key: value for key, value in message.items() if value is not None}
    reasoning = next((fields[key] for key in _REASONING_FIELDS if key in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:300] or type(error).__name__
