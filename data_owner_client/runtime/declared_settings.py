"""Settings that a frozen dataclass declares once: type, default, bounds, unit and one sentence for each field.

The annotation gives type, bounds and unit (`Annotated[float, Ge(0), Unit("s")]`), the field its default, and the class
docstring's `Attributes` section the sentence. Command line, sweep and reference page are derived from them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, Unit

from protocol.errors import InvalidRequest

Bound = Ge | Gt | Le | Lt
_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
_HOLDS = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}
_TYPE_NAMES = {bool: "yes or no", int: "integer", float: "number", str: "text", Path: "path", tuple[str, ...]: "texts"}
VARIED = "varied"
"""Metadata of a setting of which a sweep may try several values."""


@dataclass(frozen=True)
class DeclaredSetting:
    """One setting.

    Attributes:
        name: name of the field.
        annotation: annotation of the field, with its metadata.
        default: default value.
        sentence: sentence about the field in the class docstring; empty where Python drops docstrings (`-OO`).
    """

    name: str
    annotation: Any
    default: Any
    sentence: str

    @property
    def unit(self) -> str:
        """The unit of the number, or "" if it has none."""
        return next((str(each.unit) for each in _metadata(self.annotation) if isinstance(each, Unit)), "")

    @property
    def bounds(self) -> str:
        """The bounds in signs, or "" if there are none."""
        return ", ".join(map(_in_signs, _bounds(self.annotation)))

    @property
    def type_name(self) -> str:
        """The type in words, or the choices."""
        (part,) = set(_parts(self.annotation)) - {NoneType}
        return ", ".join(map(str, get_args(part))) if get_origin(part) is Literal else _TYPE_NAMES[part]


@cache
def declared_settings(settings: Any) -> tuple[DeclaredSetting, ...]:
    """The settings that a dataclass declares, in its order."""
    hints, sentences = get_type_hints(settings, include_extras=True), attribute_sentences(settings)
    return tuple(
        DeclaredSetting(field.name, hints[field.name], field.default, sentences.get(field.name, ""))
        for field in fields(settings)
    )


def attribute_sentences(documented: type) -> dict[str, str]:
    """The sentences in the `Attributes` section of a class docstring, by name."""
    from docstring_parser import parse  # only command line and documents need it

    return {
        each.arg_name: " ".join((each.description or "").split()) for each in parse(documented.__doc__ or "").params
    }


def declared_setting(settings: Any, name: str) -> DeclaredSetting:
    """One setting of a dataclass."""
    return next(each for each in declared_settings(settings) if each.name == name)


def varied_names(settings: Any) -> tuple[str, ...]:
    """Names of the settings of which a sweep may try several values."""
    hints = get_type_hints(settings, include_extras=True)
    return tuple(field.name for field in fields(settings) if VARIED in _metadata(hints[field.name]))


def require_in_bounds(settings: Any) -> None:
    """Check the numbers of a settings dataclass, as its `__post_init__`.

    Raises:
        InvalidRequest: a number is out of its bounds, or something else stands in its place.
    """
    kind: Any = type(settings)
    for name, is_integer, bounds in _bounds_of_class(kind):
        value = getattr(settings, name)
        if value is None:
            continue
        if not isinstance(value, Integral if is_integer else Real):
            raise InvalidRequest(
                f"{name} is {value!r}.", hint=f"It must be {'an integer' if is_integer else 'a number'}."
            )
        for bound in bounds:
            if not _HOLDS[type(bound)](value, _limit(bound)):
                raise InvalidRequest(f"{name} is {value!r}.", hint=f"It must be {_in_signs(bound)}.")


@cache
def _bounds_of_class(settings: Any) -> tuple[tuple[str, bool, tuple[Bound, ...]], ...]:
    """Name, whether the type is an integer, and bounds of each field that has any."""
    hints = get_type_hints(settings, include_extras=True)
    return tuple(
        (name, int in set(_parts(hint)), bounds) for name, hint in hints.items() if (bounds := tuple(_bounds(hint)))
    )


def _bounds(annotation: Any) -> tuple[Bound, ...]:
    return tuple(each for each in _metadata(annotation) if isinstance(each, Bound))


def _limit(bound: Bound) -> Any:
    return getattr(bound, type(bound).__name__.lower())


def _in_signs(bound: Bound) -> str:
    return f"{_SIGNS[type(bound)]} {_limit(bound):,}"


def _metadata(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from annotation.__metadata__
    for part in _inside(annotation):
        yield from _metadata(part)


def _parts(annotation: Any) -> Iterator[Any]:
    """The types of a union, without metadata."""
    inside = _inside(annotation)
    if not inside:
        yield annotation
    for part in inside:
        yield from _parts(part)


def _inside(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return (annotation.__origin__,)
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
