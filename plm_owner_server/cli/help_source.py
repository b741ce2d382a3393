"""A source of command-line settings whose `--help` has words instead of Python types, and flags in groups."""

from __future__ import annotations

import inspect
from argparse import (
    Action,
    ArgumentParser,
    BooleanOptionalAction,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
    _SubParsersAction,
)
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, CliSettingsSource

from plm_owner_server.setting_values import Metavar


class HelpSource(CliSettingsSource[BaseSettings]):
    """The command line of a settings class with subcommands.

    A field's `Metavar` is the word for its value. The `title` of the settings class that declares a field is the
    title of its group. A field without a constant default says in its description what holds without the flag.

    Args:
        command: class of the command.
        program: name of the program.
    """

    def __init__(self, command: type[BaseSettings], program: str) -> None:
        self._command = command
        self._groups: dict[tuple[ArgumentParser, str], _ArgumentGroup] = {}
        super().__init__(
            command,
            cli_prog_name=program,
            cli_kebab_case=True,
            cli_parse_none_str="none",
            formatter_class=RawDescriptionHelpFormatter,
            add_argument_method=self._add_flag,
            add_parser_method=_add_subcommand,
        )
        parser: Any = self.root_parser
        parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")

    def _add_flag(self, parser: ArgumentParser, *names: str, **options: Any) -> Action:
        path = options.get("dest", names[0])
        if options.get("action") == "help":
            return parser.add_argument(*names, **options)
        model, field_name = _declaration(self._command, path.split("."))
        field = model.model_fields[field_name]
        words = [field.description or "", _default_words(field)]
        if options.get("action") is BooleanOptionalAction and not issubclass(model, BaseSettings):
            # No environment variable can have set it, so that --no-flag has nothing to take back.
            options["action"], words[1] = "store_true", ""
        options["help"] = " ".join(filter(None, words)).replace("%", "%%")
        if metavar := next((mark.word for mark in _marks(field) if isinstance(mark, Metavar)), None):
            options["metavar"] = metavar
        return self._group(parser, model, field_name).add_argument(*names, **options)

    def _group(
        self, parser: ArgumentParser, model: type[BaseModel], field_name: str
    ) -> ArgumentParser | _ArgumentGroup:
        """The group of the class that declares a field; the parser itself if that class has no title."""
        declaring = next(base for base in reversed(model.__mro__) if field_name in getattr(base, "model_fields", ()))
        title = declaring.model_config.get("title") if issubclass(declaring, BaseModel) else None
        if title is None:
            return parser
        if (parser, title) not in self._groups:
            self._groups[parser, title] = parser.add_argument_group(title)
            parser.usage = "%(prog)s [options]"  # flags that need groups would fill a page here
        return self._groups[parser, title]


class _Version(Action):
    def __call__(self, parser: ArgumentParser, *_: object) -> None:
        """Print the version of the package. It is looked up only here, as a checkout may not be installed."""
        print(version("pema"))
        parser.exit()


def _add_subcommand(subcommands: _SubParsersAction[ArgumentParser], name: str, **options: Any) -> ArgumentParser:
    description = inspect.cleandoc(options["description"] or "")
    paragraph = " ".join(description.partition("\n\n")[0].split())
    sentence = paragraph.partition(". ")[0].removesuffix(".") + "."
    options |= {"description": description, "help": sentence.replace("%", "%%")}
    return subcommands.add_parser(name, **options)


def _declaration(model: type[BaseModel], path: list[str]) -> tuple[type[BaseModel], str]:
    """The class and the name of the field at a path of field names or aliases."""
    first, *rest = path
    name = next(name for name, field in model.model_fields.items() if (field.alias or name) == first)
    if not rest:
        return model, name
    annotation = model.model_fields[name].annotation
    (submodel,) = (part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel))
    return _declaration(submodel, rest)


def _default_words(field: FieldInfo) -> str:
    default = field.default
    if default in (None, PydanticUndefined, ()):
        return ""
    if isinstance(default, bool):
        return f"(default: {'yes' if default else 'no'})"
    if isinstance(default, list):
        return f"(default: {','.join(map(str, default))})"
    return f"(default: {default:g})" if isinstance(default, float) else f"(default: {default})"


def _marks(field: FieldInfo) -> Iterator[object]:
    """Annotations of a field, and of the parts of its type."""
    yield from field.metadata
    for part in get_args(field.annotation):
        yield from getattr(part, "__metadata__", ())
