"""Tasks from TOML files, built in or the user's."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.tasks.task import Task
from data_owner_client.runtime.arguments import to_path
from data_owner_client.runtime.validation_errors import first_message
from protocol.errors import InvalidData

_PACKAGE = "data_owner_client.data.tasks"


def builtin_tasks() -> list[str]:
    """Names of the tasks in this package."""
    return sorted(Path(entry.name).stem for entry in files(_PACKAGE).iterdir() if entry.name.endswith(".toml"))


def load_task(name_or_path: str | Path) -> Task:
    """Load a built-in task by name, or a task from a TOML file.

    Raises:
        InvalidData: there is no such task, the file declares none, or an example of it cannot be an answer.
    """
    if str(name_or_path) in builtin_tasks():
        text = files(_PACKAGE).joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = to_path(name_or_path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidData(
                f"{name_or_path} is neither a built-in task ({', '.join(builtin_tasks())}) nor a readable file.",
                hint="A task is a small TOML file; `pema-client build-memory --help` shows one.",
            ) from error
    try:
        task = Task.model_validate(_with_schema(tomllib.loads(text), name_or_path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidData(
            f"{name_or_path} is not TOML: {error}.", hint="Quote texts; write \\n for a newline."
        ) from error
    except ValidationError as error:
        raise InvalidData(f"{name_or_path}: {_place(error)}{first_message(error)}.", hint=_hint(error)) from error
    _require_usable_examples(task, name_or_path)
    _require_holdable_schema(task, name_or_path)
    return task


def _place(error: ValidationError) -> str:
    """The field of the first error, such as `examples.0.target: `; empty for the task as a whole."""
    path = ".".join(map(str, error.errors()[0]["loc"]))
    return f"{path}: " if path else ""


def _hint(error: ValidationError) -> str:
    if error.errors()[0]["type"] == "extra_forbidden":
        return f"A task has: {', '.join(Task.model_fields)}."
    return "`pema-client build-memory --help` shows a task."


def _with_schema(fields: dict[str, Any], name: str | Path) -> dict[str, Any]:
    """The fields of a task, with the JSON schema of the file that `answer_schema` names, relative to the task's.

    Raises:
        InvalidData: the file cannot be read, or holds no JSON object.
    """
    if not isinstance(fields.get("answer_schema"), str):
        return fields
    path = Path(name).parent / fields["answer_schema"]
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidData(
            f"{name}: answer_schema: {path} is no readable JSON file.",
            hint="Name a JSON schema's file, relative to the task's file.",
        ) from error
    return {**fields, "answer_schema": schema}


def _require_usable_examples(task: Task, name: str | Path) -> None:
    """Check the examples of a task that is written anew. Adapters may have learned with others, and still load.

    Raises:
        InvalidData: an example has an empty text, or its target is no answer or contains the stop.
    """
    for number, shot in enumerate(task.examples, 1):
        if not shot.source.strip() or not shot.target.strip():
            raise InvalidData(f"{name}: example {number} has an empty text.", hint="Give it a source and a target.")
        try:
            task.require_answer(shot)
        except InvalidData as error:
            raise InvalidData(f"{name}: example {number}: {error.detail}", hint=error.hint) from error


def _require_holdable_schema(task: Task, name: str | Path) -> None:
    """Check the schema of a task that is written anew: after training it would be late to find that it is too much.

    Raises:
        InvalidData: decoding cannot be held to the schema, or the stop could stand inside an answer.
    """
    if task.answer_schema is None:
        return
    form = AnswerForm(task.answer_schema)
    try:
        form.require_supported()
        form.require_outside([task.stop_text] if task.stop_text else [])
    except InvalidData as error:
        raise InvalidData(f"{name}: {error.detail}", hint=error.hint) from error
