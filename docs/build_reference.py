"""Write the pages in `docs/reference` from the code: `python -m docs.build_reference`.

A test fails if they are stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import dedent
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest.mock import patch

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings.sources.types import _CliPositionalArg, _CliSubCommand

from data_owner_client.cli import app
from data_owner_client.data.reading.settings import ReadingSettings
from data_owner_client.data.tasks import Shot, Task
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.gateway.settings import GatewaySettings
from data_owner_client.plm.connection.settings import ConnectionSettings
from data_owner_client.runtime.declared_settings import attribute_sentences, declared_settings
from data_owner_client.scoring.settings import ScoringSettings
from data_owner_client.training.settings import TrainingSettings
from plm_owner_server.cli.app import Command
from plm_owner_server.settings import ServerSettings
from plm_owner_server.transports.rest_app import create_app

FOLDER = Path(__file__).parent / "reference"
_WRITTEN = "<!-- Written by `python -m docs.build_reference`. Do not edit. -->\n\n"
_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
_NAMES: dict[Any, str] = {
    bool: "yes or no",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    SecretStr: "text",
    dict: "JSON",
}


def cli_page() -> str:
    """The verbs of both programs with their options."""
    with patch.object(sys, "argv", ["pema-client"]):  # the parser takes the program's name from there
        client = app.generate_docs(heading_level=2)
    server = "\n".join(_server_commands("pema-server", Command))
    intro = "The options of `pema-server serve` are listed under [settings](settings.md#server)."
    return f"{_WRITTEN}# Command lines\n\n{client.strip()}\n\n## pema-server\n\n{intro}\n\n{server}"


def settings_page() -> str:
    """All settings of client and server."""
    parts = [f"{_WRITTEN}# Settings\n"]
    for title, settings in (
        ("Training", TrainingSettings),
        ("Decoding", DecodingSettings),
        ("Sampling", SamplingSettings),
        ("Reading of files", ReadingSettings),
        ("Scoring", ScoringSettings),
        ("Connection", ConnectionSettings),
        ("Gateway", GatewaySettings),
    ):
        name = settings.__name__
        place = "" if settings is GatewaySettings else f"In Python `data_owner_client.{name}`; on"
        parts.append(f"## {title}\n\n{place or 'On'} the command line `--field-name`.\n")
        parts.append(_table(("field", "type", "default", "unit", "bounds", "meaning"), _rows(settings)))
    parts.append("## Task\n\nA TOML file; `[[examples]]` begins an example.\n")
    parts.append(_table(("field", "type", "default", "meaning"), _fields(Task)))
    parts.append("### Shot\n\nOne example of a task.\n")
    parts.append(_table(("field", "type", "default", "meaning"), _fields(Shot)))
    parts.append("## Server\n\nFlags of `pema-server serve`, as environment variables `PEMA_FLAG`; a flag wins.\n")
    groups = (group for group in ServerSettings.__bases__ if issubclass(group, BaseModel))
    for group in reversed([*groups]):  # the first fields are those of the last class
        parts.append(f"### {group.model_config['title']}\n")
        parts.append(_table(("flag", "type", "default", "bounds", "meaning"), _options(group)))
    return "\n".join(parts)


def rest_page() -> str:
    """The calls over HTTP, from the server's OpenAPI description."""
    unused: Any = SimpleNamespace()
    described = create_app(unused, max_body_bytes=1).openapi()
    parts = [f"{_WRITTEN}# REST\n\n{described['info']['description'].strip()}\n"]
    for path, methods in described["paths"].items():
        for method, call in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{call['summary']}\n")
            parts.append(f"{call['description'].strip()}\n")
            if parameters := call.get("parameters"):
                rows = (_schema_row(each["name"], each["schema"], each["required"]) for each in parameters)
                parts.append("Query:\n")
                parts.append(_table(("name", "type", "default", "meaning"), rows))
            if body := call.get("requestBody"):
                schema = body["content"]["application/json"]["schema"]
                required = schema.get("required", ())
                rows = (_schema_row(name, each, name in required) for name, each in schema["properties"].items())
                parts.append("Body:\n")
                parts.append(_table(("name", "type", "default", "meaning"), rows))
            parts.append("Answers:\n")
            answers = sorted(call["responses"].items())
            rows = ((status, each["description"], ", ".join(each.get("content", ()))) for status, each in answers)
            parts.append(_table(("status", "meaning", "content type"), rows))
    return "\n".join(parts)


PAGES = {"cli.md": cli_page, "settings.md": settings_page, "rest.md": rest_page}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(settings: Any) -> Iterator[tuple[str, ...]]:
    for each in declared_settings(settings):
        yield f"`{each.name}`", each.type_name, _default(each.default), each.unit, each.bounds, each.sentence


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    sentences = attribute_sentences(model)
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _default(field.get_default())
        yield f"`{name}`", _type(field.annotation), default, _sentence(sentences[name])


def _sentence(text: str) -> str:
    return text and f"{text[0].upper()}{text[1:].rstrip('.')}."


def _server_commands(name: str, command: Any) -> Iterator[str]:
    """Sections of the subcommands of a pydantic model, depth first."""
    for field_name, field in command.model_fields.items():
        if _CliSubCommand not in field.metadata:
            continue
        verb = f"{name} {(field.alias or field_name).replace('_', '-')}"
        (model,) = (part for part in _parts(field.annotation) if part is not NoneType)
        summary, _, rest = (model.__doc__ or "").strip().partition("\n\n")
        yield f"### {verb}\n\n{' '.join(summary.split())}\n"
        if rest.strip():
            yield f"```text\n{dedent(f'    {rest.strip()}')}\n```\n"
        group = any(_CliSubCommand in each.metadata for each in model.model_fields.values())
        if not group and not issubclass(model, ServerSettings):
            yield _table(("option", "type", "default", "bounds", "meaning"), _options(model))
        yield from _server_commands(verb, model)


def _options(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        word = (field.alias or name).replace("_", "-")
        option = f"`{word.upper()}`" if _CliPositionalArg in field.metadata else f"`--{word}`"
        default = "required" if field.is_required() else "" if field.default_factory else _default(field.default)
        metadata = [*field.metadata, *_metadata(field.annotation)]
        bounds = (
            f"{sign} {getattr(each, kind.__name__.lower()):,}"
            for each in metadata
            for kind, sign in _SIGNS.items()
            if isinstance(each, kind)
        )
        yield option, _type(field.annotation), default, ", ".join(bounds), " ".join((field.description or "").split())


def _default(value: Any) -> str:
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"`{value}`" if isinstance(value, (str, Path)) else str(value)


def _type(annotation: Any) -> str:
    names = dict.fromkeys(_type_name(part) for part in _parts(annotation) if part is not NoneType)
    return " or ".join(names)


def _type_name(part: Any) -> str:
    if get_origin(part) is Literal:
        return ", ".join(map(str, get_args(part)))
    if get_origin(part) in (list, tuple):
        return f"list of {_type(get_args(part)[0])}"
    return _NAMES.get(get_origin(part) or part) or str(part.__name__)


def _parts(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _parts(annotation.__origin__)
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def _metadata(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        for each in annotation.__metadata__:
            yield from each.metadata if isinstance(each, FieldInfo) else (each,)
    for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ():
        yield from _metadata(part)


def _schema_row(name: str, schema: dict[str, Any], required: bool) -> tuple[str, ...]:
    default = "required" if required else _default(schema.get("default"))
    return f"`{name}`", _schema_type(schema), default, " ".join(schema.get("description", "").split())


def _schema_type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_schema_type(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_schema_type(schema['items'])}" if "items" in schema else "list"
    name = str(schema.get("type", "any"))
    return {"string": "text", "boolean": "yes or no"}.get(name, name)


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
