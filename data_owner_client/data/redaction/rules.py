"""The rules of a redaction: a TOML file, or a function of the user's."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_owner_client.data.pairs import Pair
from data_owner_client.data.redaction.presidio import PresidioFinder
from data_owner_client.data.redaction.spans import (
    BUILTIN_PATTERNS,
    Finder,
    PatternFinder,
    Span,
    TermFinder,
    find_spans,
)
from data_owner_client.runtime.arguments import AnyPath, to_path
from data_owner_client.runtime.validation_errors import first_message
from protocol.errors import InvalidData

_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
_HINT = "`pema-client build-memory --help` shows rules."


class Pattern(BaseModel):
    """A regular expression.

    Attributes:
        kind: kind of its matches.
        regex: the expression; see Python's `re`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(min_length=1)
    regex: str

    @field_validator("regex")
    @classmethod
    def _check_regex(cls, regex: str) -> str:
        try:
            empty = re.compile(regex).fullmatch("")
        except re.error as error:
            raise ValueError(f"{regex!r} is no regular expression: {error}") from error
        if empty:
            raise ValueError(f"{regex!r} matches the empty text")
        return regex


class Presidio(BaseModel):
    """Entities that Microsoft's presidio finds.

    Attributes:
        language: language of the texts.
        entities: kinds of entities; empty for all that presidio knows.
        model: installed spaCy model, which finds names and places; empty for presidio's patterns alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    language: str = "en"
    entities: tuple[str, ...] = ()
    model: str = ""


class RedactionRules(BaseModel):
    """Content of a file of rules.

    Attributes:
        words: words and phrases, found as whole words in upper or lower case.
        word_files: files with one such word or phrase a line, relative to the rules' file.
        builtin: names of built-in patterns.
        patterns: regular expressions.
        presidio: entities that presidio finds; None for none.
        python: function of the user's, as `module:function`; None for none. It gives (start, end, kind) for each span.
        sources: whether source texts are redacted, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: tuple[str, ...] = ()
    word_files: tuple[str, ...] = ()
    builtin: tuple[Literal["numbers", "dates", "emails", "urls"], ...] = ()
    patterns: tuple[Pattern, ...] = ()
    presidio: Presidio | None = None
    python: str | None = Field(default=None, pattern=f"^{_FUNCTION.pattern}$")
    sources: bool = False

    @model_validator(mode="after")
    def _require_rules(self) -> Self:
        if not any((self.words, self.word_files, self.builtin, self.patterns, self.presidio, self.python)):
            raise ValueError("these rules find nothing; give words, word_files, builtin, patterns, presidio or python")
        return self


@dataclass(frozen=True)
class Redaction:
    """Rules that are ready to use.

    Attributes:
        finders: finders of spans.
        sources: whether source texts are redacted, too.
        digest: SHA-256 of the rules, with the words of their files and the code of their function.
        terms: the words and phrases alone, which no surrogate may be.
    """

    finders: tuple[Finder, ...]
    sources: bool
    digest: str
    terms: TermFinder

    @classmethod
    def from_rules(cls, rules: RedactionRules, folder: AnyPath = ".") -> Redaction:
        """The redaction of some rules.

        Args:
            rules: the rules.
            folder: folder to which the names of word files are relative.

        Raises:
            InvalidData: a word file or function cannot be read, or a word is blank.
            Unsupported: presidio is not installed, or cannot do this.
        """
        words = [*rules.words, *_read_words(rules.word_files, to_path(folder))]
        if not all(map(str.strip, rules.words)):
            raise InvalidData("The rules have a blank word.", hint="Take it out.")
        terms = TermFinder(words)
        finders: list[Finder] = [terms] if words else []
        finders += [PatternFinder(BUILTIN_PATTERNS[name], name.removesuffix("s")) for name in rules.builtin]
        finders += [PatternFinder(pattern.regex, pattern.kind) for pattern in rules.patterns]
        if rules.presidio:
            finders.append(PresidioFinder(**rules.presidio.model_dump()))
        code = ""
        if rules.python:
            function = _load_function(rules.python)
            finders.append(function)
            code = _digest_of_code(function)
        record = [rules.model_dump(mode="json", exclude={"words", "word_files"}), sorted(set(words)), code]
        digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
        return cls(tuple(finders), rules.sources, digest, terms)

    @classmethod
    def from_function(cls, function: Finder, *, sources: bool = False) -> Redaction:
        """The redaction of a function that gives (start, end, kind) for each span of a text."""
        record = json.dumps([_digest_of_code(function), sources])
        return cls((function,), sources, hashlib.sha256(record.encode()).hexdigest(), TermFinder(()))

    def spans(self, text: str) -> list[Span]:
        """The spans of a text that are to be replaced, in order and without overlap."""
        return find_spans(text, self.finders)

    def count_left(self, pair: Pair) -> int:
        """Number of spans in the pair's source that the rules leave there; of a conversation, in others' turns."""
        if self.sources:
            return 0
        texts = [pair.source]
        if pair.conversation:
            texts = [str(turn.get("content") or "") for turn in pair.conversation.turns if turn["role"] != "assistant"]
        return sum(len(self.spans(text)) for text in texts)


def left_in_sources(spans: int) -> str:
    """A warning of spans that stay in the sources; empty if there are none."""
    if not spans:
        return ""
    return f"{spans:,} such texts stand in sources, which are sent as they are: `sources = true` replaces them, too."


def load_redaction(rules: AnyPath) -> Redaction:
    """The redaction of a TOML file, or of a function `module:function`.

    Raises:
        InvalidData: there is neither such a file nor such a function, or the rules are wrong.
        Unsupported: presidio is not installed.
    """
    path = to_path(rules)
    if not path.is_file() and _FUNCTION.fullmatch(str(rules)):
        return Redaction.from_rules(RedactionRules(python=str(rules)))
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"{rules} is neither a readable file nor module:function.", hint=_HINT) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidData(
            f"{rules} is not TOML: {error}.", hint="Write a regular expression in single quotes."
        ) from error
    try:
        return Redaction.from_rules(RedactionRules.model_validate(fields), path.parent)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        hint = _HINT
        if error.errors()[0]["type"] == "extra_forbidden":
            hint = f"Rules have: {', '.join(RedactionRules.model_fields)}."
        raise InvalidData(f"{rules}: {place + ': ' if place else ''}{first_message(error)}.", hint=hint) from error


def _read_words(names: Iterable[str], folder: Path) -> Sequence[str]:
    words = list[str]()
    for name in names:
        try:
            lines = (folder / name).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidData(
                f"{folder / name} cannot be read as UTF-8 text.", hint="Write one word or phrase a line."
            ) from error
        found = [line for line in map(str.strip, lines) if line]
        if not found:
            raise InvalidData(f"{folder / name} has no words.", hint="Write one word or phrase a line.")
        words += found
    return words


def _load_function(name: str) -> Finder:
    """The function `module:function`; modules of the current folder are found, too."""
    module, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InvalidData(
            f"The function {name} cannot be imported: {error}.", hint="Write module:function, of an installed module."
        ) from error
    if not callable(found):
        raise InvalidData(f"{name} is no function.", hint="It must give (start, end, kind) for each span of a text.")
    finder: Finder = found
    return finder


def _digest_of_code(function: Finder) -> str:
    """SHA-256 over the name of a function and the source of its module, where there is one."""
    module = inspect.getmodule(function)
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__qualname__)}"
    try:
        source = inspect.getsource(module) if module else ""
    except (OSError, TypeError):
        source = ""
    return hashlib.sha256(f"{name}\n{source}".encode()).hexdigest()
