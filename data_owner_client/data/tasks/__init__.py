"""Tasks: templates, in TOML files, that turn a source text into a prompt and define where the answer ends."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_owner_client.plm.tokenizer import ChatMessages, MarkedText, PlmTokenizer, Prompt
from protocol.errors import InvalidData


class Shot(BaseModel):
    """One in-context example of a prompt.

    Attributes:
        source: source text.
        target: target of the source text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    target: str


class Task(BaseModel):
    """A task template.

    In the format `plain`, the prompt is the instruction, the examples as labelled lines, and the source with an open
    target label. The format `chat` passes these parts, one turn each, through the model's chat template.

    Attributes:
        name: name of the task.
        instruction: text before the examples; may be empty.
        source_label: label of source texts in the format `plain`.
        target_label: label of targets in the format `plain`.
        format: `plain` or `chat`.
        stop: text that ends an answer; None for a newline in `plain`, and for the end-of-sequence token in `chat`.
        examples: in-context examples that every prompt shows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    instruction: str = ""
    source_label: str = "Source"
    target_label: str = "Target"
    format: Literal["plain", "chat"] = "plain"
    stop: str | None = Field(default=None, description="text that ends an answer; default: a newline, in chat the eos")
    examples: tuple[Shot, ...] = ()

    @property
    def stop_text(self) -> str | None:
        """The text that ends an answer; None if only the end-of-sequence token does."""
        return self.stop or ("\n" if self.format == "plain" else None)

    def prompt(self, source: str, tokenizer: PlmTokenizer) -> Prompt:
        """The prompt for a source text, without a trailing space: the space belongs to the target."""
        if self.format == "chat":
            return tokenizer.render_chat(self._messages(source))
        lines = [f"{self.instruction}\n"] if self.instruction else []
        lines += [f"{self.source_label}: {shot.source}\n{self.target_label}: {shot.target}" for shot in self.examples]
        lines.append(f"{self.source_label}: {source}\n{self.target_label}:")
        return Prompt("\n".join(lines))

    def continuation(self, target: str, tokenizer: PlmTokenizer) -> MarkedText:
        """The target as it follows the prompt. It ends with the stop, from which the adapter learns to end answers."""
        answer = MarkedText(f" {target}" if self.format == "plain" else target)
        if self.stop_text is not None:
            return answer + MarkedText(self.stop_text)
        eos = tokenizer.special_token("eos_token")
        return answer + MarkedText(eos, ((0, len(eos)),))

    def stop_ids(self, tokenizer: PlmTokenizer) -> frozenset[int]:
        """Ids of all tokens that end an answer."""
        if self.stop_text is None:
            return frozenset({tokenizer.special_token_id("eos_token")})
        return tokenizer.ids_containing(self.stop_text)

    def answer(self, token_ids: list[int], tokenizer: PlmTokenizer) -> str:
        """The answer in generated token ids: their text up to the stop, without surrounding space."""
        text = tokenizer.decode(token_ids)
        return (text.split(self.stop_text)[0] if self.stop_text else text).strip()

    def _messages(self, source: str) -> ChatMessages:
        turns: ChatMessages = []
        for shot in self.examples:
            turns += [{"role": "user", "content": shot.source}, {"role": "assistant", "content": shot.target}]
        turns.append({"role": "user", "content": source})
        if self.instruction:
            # In the first user turn, because some templates have no system role.
            turns[0] = {"role": "user", "content": f"{self.instruction}\n\n{turns[0]['content']}"}
        return turns


def builtin_tasks() -> list[str]:
    """Names of the tasks in this package."""
    return sorted(Path(entry.name).stem for entry in files(__name__).iterdir() if entry.name.endswith(".toml"))


def load_task(name_or_path: str | Path) -> Task:
    """Load a built-in task by name, or a task from a TOML file.

    Raises:
        InvalidData: there is no such task, or the file does not declare one.
    """
    if str(name_or_path) in builtin_tasks():
        text = files(__name__).joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidData(
                f"{name_or_path} is neither a built-in task ({', '.join(builtin_tasks())}) nor a readable file.",
                hint="A task is a small TOML file; `pema-client build-memory --help` shows one.",
            ) from error
    try:
        return Task.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidData(
            f"{name_or_path} is not TOML: {error}.", hint="Quote texts; write \\n for a newline."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise InvalidData(
            f"{name_or_path}: {path}: {first['msg']}.", hint=f"A task has: {', '.join(Task.model_fields)}."
        ) from error
