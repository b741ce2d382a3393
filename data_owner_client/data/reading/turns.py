"""Conversations as pairs: one for each answer of the assistant, with the turns before it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_owner_client.data.pairs import Conversation, Pair, group_name
from data_owner_client.data.reading.fields import (
    TRIMMED,
    Extraction,
    Record,
    is_missing,
    joined,
    json_text,
    look_up,
    parsed,
    require_json,
    require_unique,
    usable_text,
)
from data_owner_client.data.reading.problems import InvalidText, require_unicode

_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
_ROLES |= dict.fromkeys(("assistant", "gpt", "model", "function_call"), "assistant")
_ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
_NAMES = {"system": "system", "user": "source", "assistant": "target", "tool": "the answer of a tool"}
# What a turn keeps beside its role and text.
_FURTHER_FIELDS = ("name", "tool_call_id")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_LEARNED = ("weight", "train", "trainable")


class Turn(NamedTuple):
    """A turn of a conversation.

    Attributes:
        message: the turn as chat templates read it.
        learned: whether it is a target, if it is the assistant's.
    """

    message: dict[str, Any]
    learned: bool = True

    @property
    def role(self) -> str:
        """`system`, `user`, `assistant` or `tool`."""
        return str(self.message["role"])

    @property
    def text(self) -> str:
        """The turn's text; empty for tool calls alone."""
        return str(self.message["content"])


def conversation_in(record: Record, key: str, extraction: Extraction) -> Iterator[Pair]:
    """Yield the pairs of a record with a list of turns under a key, perhaps with `system` and `tools` beside it."""
    turns = turns_of(look_up(record, key), extraction)
    return pairs_of(with_system(record.get("system"), turns), _tools_of(record), extraction)


def prompt_and_completion(record: Record, extraction: Extraction) -> Iterator[Pair]:
    """Yield the pairs of two texts, or of lists of turns that follow each other. Those of the prompt are no targets."""
    prompt = look_up(record, "prompt")
    completion = look_up(record, "completion") if extraction.need_targets else None
    if _is_turns(parsed(prompt)) or _is_turns(parsed(completion)):
        shown = _turns_or_text(prompt, "user", extraction)
        completed = [] if completion is None else _turns_or_text(completion, "assistant", extraction)
        return pairs_of([*shown, *completed], _tools_of(record), extraction, shown=len(shown))
    return iter([extraction.pair(prompt, completion)])


def instruction_and_answer(record: Record, answer: str, extraction: Extraction) -> Iterator[Pair]:
    """Yield the pairs of an instruction with its input behind it, and of the conversation in `history` before it."""
    source = look_up(record, "instruction")
    for name in ("input", "context"):
        if not is_missing(record.get(name)):
            require_unicode(record[name], name)
            source = joined(source, record[name], "instruction")
    messages = [*_history(record.get("history")), ("user", source)]
    if extraction.need_targets:
        messages.append(("assistant", json_text(look_up(record, answer))))
    turns = [_turn({"role": role, "content": text}, extraction) for role, text in messages]
    return pairs_of(with_system(record.get("system"), turns), None, extraction)


def turns_of(value: object, extraction: Extraction) -> list[Turn]:
    """The turns of a list of messages.

    Raises:
        InvalidText: it is none, or a message has an unknown role, no text, or a part that cannot be learned.
    """
    messages = parsed(value)
    require_json(messages)
    if not _is_turns(messages):
        raise InvalidText("no list of turns", hint='For example [{"role": "user", "content": "…"}].')
    turns = [_turn(message, extraction) for message in messages]  # type: ignore[attr-defined]
    return [turn for turn in turns if turn.role != "system" or turn.text.strip()]


def with_system(text: object, turns: list[Turn]) -> list[Turn]:
    """The turns behind a system turn with a text, if there is one."""
    if is_missing(text):
        return turns
    if turns and turns[0].role == "system":
        return [Turn(turns[0].message | {"content": joined(text, turns[0].text, "system")}), *turns[1:]]
    return [Turn({"role": "system", "content": usable_text(text, "system")}), *turns]


def pairs_of(
    turns: Sequence[Turn], tools: Sequence[Any] | None, extraction: Extraction, *, shown: int = 0
) -> Iterator[Pair]:
    """Yield a pair for each answer of the assistant that is learned; without targets, the pair of the last question.

    Args:
        turns: the whole conversation.
        tools: tools that it may use; None for none.
        extraction: how pairs are taken.
        shown: number of first turns that are no targets.

    Raises:
        InvalidText: an answer stands behind no question, or there is none.
    """
    if not extraction.need_targets:
        question = turns[:-1] if turns and turns[-1].role == "assistant" else turns
        yield _pair(question, None, tools, "", extraction)
        return
    answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers or not any(turn.role == "user" for turn in turns):
        raise InvalidText(
            "a conversation without an answer of the assistant", hint="Give a user's turn, and the answer behind it."
        )
    for at in answers:
        if at == 0 or turns[at - 1].role not in ("user", "tool"):
            raise InvalidText(
                "an answer of the assistant that follows no turn of the user or a tool",
                hint="Begin with the user's turn, and join turns of the assistant that follow each other.",
            )
    targets = [at for at in answers if at >= shown]
    learned = [at for at in targets if turns[at].learned]
    extraction.unlearned += len(targets) - len(learned)
    group = _group_of(turns, tools) if len(learned) > 1 else ""
    for at in learned:
        yield _pair(turns[:at], turns[at], tools, group, extraction)


def _pair(
    turns: Sequence[Turn], answer: Turn | None, tools: Sequence[Any] | None, group: str, extraction: Extraction
) -> Pair:
    """The pair of an answer. A single question of the user alone is a text, without a conversation."""
    others = [turn for turn in turns if turn.role != "system"]
    if not others:
        raise InvalidText("a conversation without a question", hint="Give a user's turn.")
    source = others[-1].text
    if len(others) == 1 and turns[0].role == "system":
        source = str(joined(turns[0].text, source, "system"))
    if others[-1].role == "user" and extraction.need_targets:
        usable_text(others[-1].text, "source")
    reply = answer.message if answer is not None and "tool_calls" in answer.message else None
    if answer is not None and reply is None:
        usable_text(answer.text, "target")
    alone = len(turns) == 1 and not tools
    conversation = None if alone else Conversation(tuple(turn.message for turn in turns), tuple(tools or ()) or None)
    target = None if answer is None else answer.text
    return Pair(source, target, extraction.origin, conversation=conversation, reply=reply, group=group)


def _group_of(turns: Sequence[Turn], tools: Sequence[Any] | None) -> str:
    """The name of a conversation, which depends on its content alone."""
    return group_name(json.dumps([[turn.message for turn in turns], tools]))


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _turns_or_text(value: object, role: str, extraction: Extraction) -> list[Turn]:
    if _is_turns(parsed(value)):
        return turns_of(value, extraction)
    return [_turn({"role": role, "content": value}, extraction)]


def _turn(turn: Mapping[str, Any], extraction: Extraction) -> Turn:
    require_unique(turn)
    told = str(turn.get("role", turn.get("from"))).lower()
    role = _ROLES.get(told)
    if role is None:
        raise InvalidText(
            f"a turn of the unknown role {told!r:.20}", hint="Roles are system, user, assistant and tool."
        )
    if any(not is_missing(turn.get(name)) for name in _THOUGHTS):
        raise InvalidText("a turn with thoughts", hint="Leave them out: only answers can be learned.")
    further = {name: turn[name] for name in _FURTHER_FIELDS if not is_missing(turn.get(name))}
    if not is_missing(calls := parsed(turn.get("tool_calls"))):
        further["tool_calls"] = _checked_calls(calls)
    content = _content(turn.get("content", turn.get("value")))
    if told == "function_call" or not is_missing(turn.get("function_call")):
        further["tool_calls"] = _calls_of(turn.get("function_call") or content)
        content = content if told != "function_call" else ""
    if content is None and "tool_calls" in further:
        content = ""
    require_unicode(content, _NAMES[role])
    text = str(content).strip(TRIMMED) if extraction.trim or role == "assistant" else str(content)
    return Turn({"role": role, "content": text, **further}, _is_learned(turn))


def _is_learned(turn: Mapping[str, Any]) -> bool:
    """Return False if the file excludes the turn: by OpenAI's `weight`, axolotl's `train` or Tinker's `trainable`."""
    values = [turn[name] for name in _LEARNED if turn.get(name) is not None]
    if wrong := [value for value in values if value not in (0, 1)]:
        raise InvalidText(f"a weight that is neither 0 nor 1, {wrong[0]!r:.20}", hint="Leave it out, or give 0 or 1.")
    return all(values)


def _content(content: object) -> object:
    """The content of a turn; the joined texts if it is a list of parts that are all texts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise InvalidText("a turn with parts that are no texts", hint="Only texts can be learned.")
    return "".join(map(str, texts))


def _calls_of(value: object) -> list[dict[str, Any]]:
    """Calls of functions as OpenAI's `tool_calls`, from one call or several, perhaps as JSON text."""
    found = parsed(value)
    calls: list[Any] = found if isinstance(found, list) else [found]
    return _checked_calls([{"type": "function", "function": {"arguments": {}, **_object(call)}} for call in calls])


def _checked_calls(calls: object) -> list[Any]:
    """OpenAI's `tool_calls`: functions with names, and with arguments as an object or as JSON text of one.

    Raises:
        InvalidText: they are no such calls.
    """
    listed = calls if isinstance(calls, list) else []
    functions = [_object(_object(call).get("function", call)) for call in listed]
    if not functions or not all(isinstance(function.get("name"), str) for function in functions):
        raise InvalidText(
            "a call of a function without its name", hint='For example {"name": "clock", "arguments": {"zone": "UTC"}}.'
        )
    arguments = [parsed(function.get("arguments")) for function in functions]
    if not all(is_missing(each) or isinstance(each, Mapping) for each in arguments):
        raise InvalidText(
            "a call of a function whose arguments are no JSON object", hint='For example {"zone": "UTC"}, or {}.'
        )
    return listed


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _history(history: object) -> Iterator[tuple[str, object]]:
    """Yield role and text of each turn of an alpaca record's `history`, which has pairs of question and answer."""
    found = parsed(history)
    if is_missing(found):
        return
    if not isinstance(found, list) or not all(isinstance(each, list) and len(each) == 2 for each in found):
        raise InvalidText("a history that has other things than pairs", hint='For example [["question", "answer"], …].')
    for question, answer in found:
        yield "user", question
        yield "assistant", answer


def _tools_of(record: Record) -> list[Any] | None:
    """The tools of a record: a list, or JSON text of one; functions get the envelope that OpenAI's tools have."""
    if not is_missing(record.get("chat_template_kwargs")):
        raise InvalidText("template arguments of its own", hint="Give the task `template_arguments` in their place.")
    tools = parsed(record.get("tools"))
    if is_missing(tools):
        tools = parsed(record.get("functions"))
    if is_missing(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidText("tools that are no list of objects", hint="Give JSON schemas, as OpenAI's API takes them.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
