"""The turns of a prompt: those of a text or a conversation, with the instruction and the examples of a task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

from data_owner_client.data.pairs import Conversation, Source, is_single_question, text_of
from data_owner_client.data.reading.problems import InvalidText
from protocol.chat_template import ChatMessage

CHAT_HINT = 'Use a task with kind = "chat", for example --task chat.'
"""Hint for conversations that a task does not show."""


def single_text(source: Source) -> str:
    """The text of a single question, with a system turn's text before it.

    Raises:
        InvalidText: the source is a conversation of several turns, or has tools.
    """
    if isinstance(source, Conversation) and not source.is_single_question:
        what = "tools of its own" if source.tools else "earlier turns of its conversation"
        raise InvalidText(f"{what}, which the task's prompt does not show", hint=CHAT_HINT)
    return text_of(source)


def chat_turns(
    source: Source,
    *,
    instruction: str,
    instruction_role: Literal["user", "system"],
    examples: Iterable[tuple[str, str]],
) -> list[ChatMessage]:
    """The turns that a chat template renders.

    A system turn of the conversation stands in the place of the instruction. Examples come as earlier turns before a
    single question only: in a conversation, they would read as a part of it.

    Args:
        source: text of the user, or conversation.
        instruction: text for the first user's turn or a system turn; may be empty.
        instruction_role: whose turn has the instruction.
        examples: source and target of each example.

    Raises:
        InvalidText: the conversation cannot be answered.
    """
    system, turns = list[ChatMessage](), [_turn("user", source)]
    if isinstance(source, Conversation):
        _require_question(source)
        turns = [with_parsed_arguments(turn) for turn in _without_system(source)]
        system = list(source.turns[: len(source.turns) - len(turns)])
    if is_single_question(source):
        shots = [_turn(*part) for shot in examples for part in zip(("user", "assistant"), shot, strict=True)]
        turns = [*shots, *turns]
    if system or not instruction:
        return [*system, *turns]
    if instruction_role == "system":
        return [_turn("system", instruction), *turns]
    first = next((at for at, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        return [_turn("user", instruction), *turns]
    turns[first] = {**turns[first], "content": f"{instruction}\n\n{turns[first]['content']}"}
    return turns


def _without_system(conversation: Conversation) -> tuple[ChatMessage, ...]:
    return conversation.turns[1:] if conversation.turns[0]["role"] == "system" else conversation.turns


def _require_question(conversation: Conversation) -> None:
    """Refuse a conversation without an open question.

    Raises:
        InvalidText: the last turn is the assistant's or the system's.
    """
    role = conversation.turns[-1]["role"]
    if role in ("assistant", "system"):
        raise InvalidText(f"a conversation that ends with a turn of the {role}", hint="End it with the turn to answer.")


def _turn(role: str, content: Any) -> ChatMessage:
    return {"role": role, "content": content}


def with_parsed_arguments(message: ChatMessage) -> ChatMessage:
    """The message with arguments of tool calls as objects, where JSON text spells them.

    OpenAI's API has text there, and most templates write JSON of what they find. vLLM parses it as well, and takes a
    call without arguments for one with no argument (`vllm/entrypoints/chat_utils.py`, `_postprocess_messages`).
    """
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_parsed(call) for call in calls]} if calls else message


def _parsed(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parsed(call["function"])}
    if "name" in call and call.get("arguments") in (None, ""):
        return {**call, "arguments": {}}
    with suppress(ValueError, RecursionError):
        if isinstance(call.get("arguments"), str) and isinstance(parsed := json.loads(call["arguments"]), dict):
            return {**call, "arguments": parsed}
    return call
