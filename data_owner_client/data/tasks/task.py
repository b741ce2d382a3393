"""A task: a template that turns a source text into a prompt, and defines the form and the end of an answer."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from data_owner_client.data.chat_turns import CHAT_HINT, chat_turns, single_text, with_parsed_arguments
from data_owner_client.data.conversations import (
    AssistantTurn,
    end_of_assistant_turn,
    render_assistant_turn,
    render_prompt,
)
from data_owner_client.data.pairs import Conversation, Pair, Source
from data_owner_client.data.reading.problems import InvalidText
from data_owner_client.data.stops import Stops
from data_owner_client.data.tasks.chat_templates import model_template
from data_owner_client.data.tasks.kinds import Kind, answer_text, require_fields_of_kind, with_defaults
from data_owner_client.plm.tokenizer import MarkedText, PlmTokenizer, Prompt
from protocol.chat_template import ChatMessage, ChatTemplate
from protocol.errors import InvalidData, Unsupported

# Variables of a chat template that a task sets in other ways.
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt"}
_CHAT_FIELDS = ("instruction_role", "template", "template_arguments", "tools", "date")
# A code of ISO 639, perhaps with a region or script.
_LANGUAGE = re.compile("[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*")


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
        stop: text that ends an answer; None or empty for a newline in `plain`, and in `chat` for the end of a turn.
        examples: in-context examples that every prompt shows.
        instruction_role: in `chat`, whose turn has the instruction: the first `user` turn, or a `system` turn where
            the template takes one. The default stays `user`, because adapters without the field learned such prompts.
        template: in `chat`, name of the chat template; None for the model's default.
        template_arguments: in `chat`, further variables of the template, such as `enable_thinking`.
        tools: in `chat`, JSON schemas of tools; None for none.
        kind: kind of the task, which decides the form of its answers, its metrics, and the defaults of the labels
            before texts and of the instruction.
        labels: of `classify`, all labels; empty for those of the training pairs.
        answer_schema: of `extract`, JSON schema of the answers; None for any JSON.
        language: language of the answers, such as `de`, for metrics that depend on it; None for English.
        date: in `chat`, day that the template's clock shows. None is the day when the memory is begun, if the template
            reads the clock.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    kind: Kind = "rewrite"
    labels: tuple[str, ...] = ()
    answer_schema: dict[str, JsonValue] | None = None
    language: str | None = None
    instruction: str = ""
    source_label: str = "Source"
    target_label: str = "Target"
    format: Literal["plain", "chat"] = "plain"
    stop: str | None = Field(
        default=None, description="text that ends an answer; default: a newline, in chat the end of a turn"
    )
    examples: tuple[Shot, ...] = ()
    instruction_role: Literal["user", "system"] = "user"
    template: str | None = None
    template_arguments: dict[str, JsonValue] = {}
    tools: tuple[dict[str, JsonValue], ...] | None = None
    date: datetime.date | None = None

    @model_validator(mode="before")
    @classmethod
    def _imply_format(cls, fields: object) -> object:
        """Conversations have turns, which the format `plain` does not write."""
        if not isinstance(fields, dict) or fields.get("kind") != "chat":
            return fields
        if fields.get("format", "chat") == "plain":
            raise ValueError('kind = "chat" needs format = "chat"; leave the format away')
        return {"format": "chat", **fields}

    @model_validator(mode="before")
    @classmethod
    def _fill_in_kind(cls, fields: object) -> object:
        return with_defaults(fields) if isinstance(fields, dict) else fields

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str | None) -> str | None:
        if language is not None and not _LANGUAGE.fullmatch(language):
            raise ValueError("write the code of a language, such as `de` or `pt-BR`")
        return language

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        require_fields_of_kind(self.kind, self.labels, self.answer_schema, self.stop_text)
        return self

    @model_validator(mode="after")
    def _check_chat_fields(self) -> Self:
        fields = type(self).model_fields
        unused = [name for name in _CHAT_FIELDS if getattr(self, name) != fields[name].default]
        if unused and self.format == "plain":
            raise ValueError(f'{", ".join(unused)} needs format = "chat"')
        if wrong := sorted(_OWN_VARIABLES.intersection(self.template_arguments)):
            raise ValueError(f"template_arguments cannot set {', '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _check_characters(self) -> Self:
        for name, value in self.model_dump().items():
            try:
                json.dumps(value, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} has half of a surrogate pair") from error
        return self

    @property
    def stop_text(self) -> str | None:
        """The text that ends an answer; None if only the model or its chat template ends it."""
        return self.stop or ("\n" if self.format == "plain" else None)

    def prompt(self, source: Source, tokenizer: PlmTokenizer) -> Prompt:
        """The prompt for a text or conversation, without a trailing space: the space belongs to the target.

        Raises:
            Unsupported: the model has no chat template.
            InvalidData: the chat template refuses the task's messages, or the task shows no conversations.
        """
        if self.format == "chat":
            return render_prompt(self._messages(source), self._chat_template(tokenizer, source))
        lines = [f"{self.instruction}\n"] if self.instruction else []
        lines += [f"{self.source_label}: {shot.source}\n{self.target_label}: {shot.target}" for shot in self._shots]
        lines.append(f"{self.source_label}: {single_text(source)}\n{self.target_label}:")
        return Prompt("\n".join(lines))

    def prompt_and_target(self, pair: Pair, tokenizer: PlmTokenizer) -> tuple[Prompt, MarkedText]:
        """The prompt for a pair's question, and the target as it follows, with the end that the adapter learns.

        Raises:
            Unsupported: the model has no chat template, or neither it nor the task has an end for an answer.
            InvalidData: the target is no answer of the task's kind, or contains the stop; the chat template would write
                another conversation; or the task shows no conversations.
        """
        if self.format == "plain":
            if pair.reply is not None:
                raise InvalidText("an answer that is more than text", hint=CHAT_HINT, origin=pair.origin)
            answer = _with_end(MarkedText(f" {self.answer(pair)}"), self.stop_text or "")
            return self.prompt(pair.question, tokenizer), answer
        template = self._chat_template(tokenizer, pair.question)
        turn = self._turn_of(pair, tokenizer)
        if self.stop_text:
            return turn.prompt, _with_end(turn.text, self.stop_text)
        end = turn.end if pair.reply and turn.end.text else end_of_assistant_turn(template)
        if turn.end.text and turn.end != end:
            raise InvalidData(
                "The model's chat template ends this turn in another way than others.",
                hint="Give the task a `stop` text.",
            )
        if end.text and not end.special_spans:
            return turn.prompt, _with_end(turn.text, end.text)
        return turn.prompt, turn.text + (end if end.text else _eos(tokenizer))

    def reference(self, pair: Pair, tokenizer: PlmTokenizer) -> str:
        """The text of the pair's answer when it is decoded: the target, or tool calls as the template writes them.

        Raises:
            InvalidData: as `prompt_and_target`.
        """
        if pair.reply is None or self.format == "plain":
            return self.answer(pair)
        return self._turn_of(pair, tokenizer).text.without_special_tokens().strip()

    def stops(self, tokenizer: PlmTokenizer, eos_ids: Iterable[int]) -> Stops:
        """The ends of an answer: the task's stop, or what the chat template writes behind a turn; and the model's own.

        Args:
            tokenizer: the PLM's tokenizer.
            eos_ids: tokens after which the model itself stops.
        """
        if self.stop_text:
            return Stops((self.stop_text,), frozenset(eos_ids))
        end = end_of_assistant_turn(self._chat_template(tokenizer))
        if end.text and not end.special_spans:
            return Stops((end.text,), frozenset(eos_ids))
        spelling = end.text or tokenizer.special_tokens.get("eos_token", "")
        own = {tokenizer.special_ids[spelling]} if spelling in tokenizer.special_ids else set()
        return Stops((), frozenset(eos_ids) | own)

    def on_day(self, day: datetime.date | None, tokenizer: PlmTokenizer) -> Task:
        """The task with a day for the clock of its chat template, if that reads the clock and the task has no day."""
        if day is None or self.date or self.format == "plain":
            return self
        # A conversation may bring tools, for which the model may have another template.
        templates = (self._template_for(tokenizer, tools) for tools in (self.tools, ()))
        return self.model_copy(update={"date": day}) if any(each.reads_clock for each in templates) else self

    def loses_tools(self, source: Source, tokenizer: PlmTokenizer) -> bool:
        """True if the source has tools that the model's chat template does not write."""
        tools = source.tools if isinstance(source, Conversation) else None
        return bool(tools) and self.format == "chat" and not self._chat_template(tokenizer, source).reads_tools

    def require_answer(self, pair: Pair | Shot) -> None:
        """Check that the target of a pair or an example can be an answer.

        Raises:
            InvalidData: it is no answer of the task's kind, or contains the task's stop.
        """
        target = self.answer(pair)
        if self.stop_text:
            _with_end(MarkedText(f" {target}" if self.format == "plain" else target), self.stop_text)

    def answer(self, pair: Pair | Shot) -> str:
        """The pair's target in the form that the adapter learns."""
        origin = pair.origin if isinstance(pair, Pair) else None
        return answer_text(self.kind, self.labels, self.answer_schema, pair.target or "", origin)

    @property
    def _shots(self) -> list[Shot]:
        """The examples, with targets in the form that the adapter learns."""
        schema = json.dumps(self.answer_schema)
        return [_as_learned(shot, self.kind, self.labels, schema) for shot in self.examples]

    def _messages(self, source: Source) -> list[ChatMessage]:
        return chat_turns(
            source,
            instruction=self.instruction,
            instruction_role=self.instruction_role,
            examples=[(shot.source, shot.target) for shot in self._shots],
        )

    def _turn_of(self, pair: Pair, tokenizer: PlmTokenizer) -> AssistantTurn:
        reply = pair.reply or {"role": "assistant", "content": self.answer(pair)}
        template = self._chat_template(tokenizer, pair.question)
        return render_assistant_turn(self._messages(pair.question), with_parsed_arguments(reply), template)

    def _chat_template(self, tokenizer: PlmTokenizer, source: Source = "") -> ChatTemplate:
        """The model's template, with the conversation's own tools or else the task's."""
        return self._template_for(tokenizer, (isinstance(source, Conversation) and source.tools) or self.tools)

    def _template_for(self, tokenizer: PlmTokenizer, tools: Sequence[ChatMessage] | None) -> ChatTemplate:
        return model_template(tokenizer, self.template, tools=tools, arguments=self.template_arguments, day=self.date)


@lru_cache(maxsize=1024)
def _as_learned(shot: Shot, kind: Kind, labels: tuple[str, ...], schema: str) -> Shot:
    """The example with its target in the form that the adapter learns. Every prompt shows it; checking takes longer."""
    return Shot(source=shot.source, target=answer_text(kind, labels, json.loads(schema), shot.target))


def _with_end(answer: MarkedText, end: str) -> MarkedText:
    """The answer with the text that ends it.

    Raises:
        InvalidData: the answer contains its end, be it in the space before the target.
    """
    if (answer.text + end).index(end) < len(answer.text):
        raise InvalidData(
            f"The target contains the stop {end!r} or ends with a part of it, so an answer would end before it does.",
            hint="Replace it in the texts, or give the task another `stop`.",
        )
    return answer + MarkedText(end)


def _eos(tokenizer: PlmTokenizer) -> MarkedText:
    """The end-of-sequence token, with which the model ends turns whose end its chat template does not write.

    Raises:
        Unsupported: the tokenizer has no such token.
    """
    spelling = tokenizer.special_tokens.get("eos_token", "")
    if spelling not in tokenizer.special_ids:
        raise Unsupported("The model's tokenizer has no eos_token.", hint="Give the task a `stop` text.")
    return MarkedText(spelling, ((0, len(spelling)),))
