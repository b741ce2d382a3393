"""The Jinja environment in which transformers renders chat templates, with bounds on work and sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import date, datetime, time
from functools import wraps
from itertools import count
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_STEPS = 200_000
"""Loop iterations and calls of one rendering."""
_MAX_LENGTH = 1 << 24
"""Characters or items of one value, and characters of the result."""
_MAX_INTEGER_BITS = 10_000
_PADDING_FILTERS = frozenset({"batch", "center", "format", "indent", "slice"})
_LONG_NUMBER = re.compile(r"[0-9]{8,}")
# As in "%*d" and "{:{}}".
_WIDTH_FROM_VALUES = re.compile(r"\*|\{[^{}]*\{")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of a chat template.

    Args:
        day: the day that the template's clock shows; None for the present moment.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, day: date | None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, LoopControlExtension])
        self.code_generator_class = _BoundedCode
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_template_error,
            "strftime_now": lambda form: _moment(day).strftime(form),
            "dict": _Dictionary(),
            "namespace": _GuardedNamespace,
        }
        del self.globals["lipsum"]  # which makes any number of random paragraphs

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template, as one step."""
        _spend_step()
        method = getattr(function, "__wrapped__", function)  # Jinja wraps the method `format` of a text
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            _require_small_widths(text if method.__name__.startswith("format") else None, [*args, *kwargs.values()])
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, unless it would be too large."""
        _require(_fits(operator, left, right), "makes too large a value")
        if operator == "%" and isinstance(left, str):
            _require_small_widths(left, right if isinstance(right, tuple) else ())
        return _bounded(super().call_binop(context, operator, left, right))

    def bounded(self, value: Any) -> Any:
        """The value, unless it is too large."""
        return _bounded(value)

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each as one step."""
        for item in items:
            _spend_step()
            yield item


def render_within_bounds(template: Template, variables: Mapping[str, Any]) -> str:
    """The text that a template of a `TemplateEnvironment` writes.

    Raises:
        SecurityError: the template leaves the sandbox or its bounds.
        Exception: whatever else the template raises.
    """
    bounds = _steps.set(count())
    parts: list[str] = []
    length = 0
    try:
        for part in template.generate(variables):
            parts.append(part)
            length += len(part)
            _require(length <= _MAX_LENGTH, "writes too long a text")
    finally:
        _steps.reset(bounds)
    return "".join(parts)


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


def _require_small_widths(form: str | None, values: Iterable[Any]) -> None:
    """Refuse large widths of a format; without a format, large numbers, each of which may be a width."""
    if form is None or _WIDTH_FROM_VALUES.search(form):
        _require(not any(isinstance(value, int) and value > _MAX_LENGTH for value in values), "pads a text too far")
    _require(form is None or _LONG_NUMBER.search(form) is None, "pads a text too far")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if name in _PADDING_FILTERS:
            _require_small_widths(str(args[0]) if name == "format" else None, [*args, *kwargs.values()])
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
