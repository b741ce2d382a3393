"""Conversations by the model's own chat template: prompts, and targets as the template writes an assistant's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from data_owner_client.plm.tokenizer import MarkedText, Prompt
from protocol.chat_template import ChatMessage, ChatTemplate
from protocol.errors import InvalidData

_NO_END = MarkedText("")
_TOOL_RESULT = "Done."
_ANSWER = "Good morning."
_TURNS: Sequence[ChatMessage] = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": _ANSWER},
)


@dataclass(frozen=True)
class AssistantTurn:
    """The last turn of a conversation, as the template writes it.

    Attributes:
        prompt: everything before the turn's text.
        text: text of the turn, with the space that the template writes around it.
        end: special token or text that the template writes behind the turn; empty if it writes none.
    """

    prompt: Prompt
    text: MarkedText
    end: MarkedText


def fold_system_turn(messages: Sequence[ChatMessage], template: ChatTemplate) -> list[ChatMessage]:
    """The messages with the text of a system turn before the first user's, if the template takes no system turn."""
    user = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if messages[0]["role"] != "system" or user is None or template.takes_system_turn:
        return list(messages)
    content = f"{messages[0]['content']}\n\n{messages[user]['content']}"
    return [*messages[1:user], {**messages[user], "content": content}, *messages[user + 1 :]]


def render_prompt(messages: Sequence[ChatMessage], template: ChatTemplate) -> Prompt:
    """The prompt for the assistant's next turn. A system turn that the template refuses goes before the user's text.

    Raises:
        InvalidData: the template refuses the messages, or leaves their texts out.
    """
    messages = fold_system_turn(messages, template)
    text = template.render(messages, add_generation_prompt=True)
    if not template.takes_user_turn:
        raise InvalidData("The model's chat template leaves out the user's text.", hint='Try `format = "plain"`.')
    later = (str(message["content"]).strip() for message in messages[1:] if message["role"] == "system")
    if any(content not in text.text for content in later):
        raise InvalidData(
            "The model's chat template leaves out a later system turn.", hint="Give one, where the conversation begins."
        )
    return Prompt(text.text, text.special_spans, with_special_tokens=False)


def render_assistant_turn(messages: Sequence[ChatMessage], reply: ChatMessage, template: ChatTemplate) -> AssistantTurn:
    """The assistant's turn behind a conversation, such that prompt and turn are the conversation as a whole.

    Args:
        messages: turns before the assistant's.
        reply: the assistant's message; beside `content` it may have tool calls, or whatever else the template writes.
        template: the model's chat template.

    Raises:
        InvalidData: the template refuses the messages, writes another conversation once the turn is there, or leaves
            a part of the turn out.
    """
    messages = fold_system_turn(messages, template)
    prompt = render_prompt(messages, template)
    whole = template.render([*messages, reply], add_generation_prompt=False)
    turn = _without_beginning(whole, prompt)
    if turn is None:
        raise InvalidData(
            "The model's chat template writes another conversation before the target than in the prompt.",
            hint="The task may need `template_arguments` that switch thoughts off. If the template moves a system "
            'turn, leave it out of the conversation, or set `instruction_role = "user"`.',
        )
    if set(reply) <= {"role", "content"}:
        text_end = _end_of_target(turn, reply["content"])
        end = _end_of_turn(turn, text_end)
        stop = end.at if end else text_end
    else:
        _require_parts(turn, reply)
        end = _end_of_reply(turn, [*messages, reply], whole, template)
        stop = end.at if end else len(turn.text.rstrip())
    return AssistantTurn(prompt, _part(turn, 0, stop), end.text if end else _NO_END)


@lru_cache(maxsize=64)
def end_of_assistant_turn(template: ChatTemplate) -> MarkedText:
    """The end that the template writes behind an assistant's turn; empty if it writes none, or refuses two turns.

    Some templates write no end behind the last turn. The special token that begins the next turn is the end then.
    """
    end = _end_of_last_turn(template)
    if not end.text:
        following = _end_behind(_ANSWER, [*_TURNS, _TURNS[0]], template)
        return following if following.special_spans else _NO_END
    return end


@lru_cache(maxsize=64)
def _end_of_last_turn(template: ChatTemplate) -> MarkedText:
    return _end_behind(_ANSWER, _TURNS, template)


def _end_behind(answer: str, messages: Sequence[ChatMessage], template: ChatTemplate) -> MarkedText:
    """The end of the turn with the answer. The template may write thoughts before the answer."""
    try:
        whole = template.render(messages, add_generation_prompt=False)
    except InvalidData:
        return _NO_END
    at = whole.text.rfind(answer)
    end = _end_of_turn(whole, at + len(answer)) if at >= 0 else None
    return end.text if end else _NO_END


@dataclass(frozen=True)
class _End:
    at: int
    text: MarkedText


def _end_of_target(turn: MarkedText, target: str) -> int:
    """The end of the target's text in its turn, in characters.

    Raises:
        InvalidData: the turn does not begin with the target.
    """
    start = turn.text.find(target)
    if start < 0 or turn.text[:start].strip():
        raise InvalidData(
            "The model's chat template does not begin the assistant's turn with the target as it is.",
            hint="Take away space around the target. Or set `template_arguments` of the task, where a template can "
            "leave out its thinking.",
        )
    return start + len(target)


def _end_of_turn(whole: MarkedText, at: int) -> _End | None:
    """The end of a turn whose text ends at a character: the next special token, or else the text up to it.

    Space alone is no end, because a turn's text may have the same.
    """
    rest = whole.text[at:]
    begin = at + len(rest) - len(rest.lstrip())
    special = next((span for span in whole.special_spans if span[0] >= at), (len(whole.text), len(whole.text)))
    if special[0] <= begin:
        return _End(special[0], _part(whole, *special)) if special[1] > special[0] else None
    return _End(at, MarkedText(whole.text[at : special[0]].rstrip()))


def _end_of_reply(
    turn: MarkedText, messages: Sequence[ChatMessage], whole: MarkedText, template: ChatTemplate
) -> _End | None:
    """The end of a turn that has more than text: the usual end of turns, or the special token that stands last.

    Some models end a call of tools in another way than an answer.

    Raises:
        InvalidData: the template ends other turns, and not this one.
    """
    usual = _end_of_last_turn(template)
    if not usual.text:
        return _beginning_of_result(turn, messages, whole, template)
    specials = [_End(start, _part(turn, start, end)) for start, end in turn.special_spans]
    last = [each for each in specials if not turn.text[each.at + len(each.text.text) :].strip()]
    at = turn.text.find(usual.text)
    texts = [_End(at, usual)] if at >= 0 and not usual.special_spans else []
    end = next((each for each in [*texts, *specials] if each.text == usual), next(iter(last), None))
    if end is None:
        raise InvalidData(
            "The model's chat template writes no end behind the assistant's turn.",
            hint="Leave out turns that call tools, or give the task a `template` that ends them.",
        )
    return end


def _beginning_of_result(
    turn: MarkedText, messages: Sequence[ChatMessage], whole: MarkedText, template: ChatTemplate
) -> _End | None:
    """The special token that begins the tool's turn behind a call; None if there is none."""
    result = {"role": "tool", "content": _TOOL_RESULT}
    try:
        following = _without_beginning(template.render([*messages, result], add_generation_prompt=False), whole)
    except InvalidData:
        return None
    end = _end_of_turn(following, 0) if following else None
    return _End(len(turn.text.rstrip()), end.text) if end and end.text.special_spans else None


def _require_parts(turn: MarkedText, reply: ChatMessage) -> None:
    """Refuse a turn without the tools that the reply calls, or else without its text.

    Raises:
        InvalidData: one is missing.
    """
    names = [_name(call) for call in reply.get("tool_calls") or ()]
    parts = names or [str(reply.get("content") or "").strip()]
    if missing := [part for part in parts if part not in turn.text]:
        raise InvalidData(
            f"The model's chat template leaves out {missing[0]!r:.60} of the assistant's turn.",
            hint="Use a model whose template writes tool calls, or leave such turns out.",
        )


def _name(call: object) -> str:
    """The name of the tool that is called, from OpenAI's form or the bare function."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidData(
            "A tool call has no function with a name.",
            hint='For example {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}.',
        )
    return str(function["name"])


def _without_beginning(whole: MarkedText, beginning: MarkedText) -> MarkedText | None:
    """The text behind its beginning; None if it does not begin so."""
    at = len(beginning.text)
    rest = _part(whole, at, len(whole.text))
    return rest if MarkedText(beginning.text, beginning.special_spans) + rest == whole else None


def _part(whole: MarkedText, start: int, end: int) -> MarkedText:
    """A part of a text, with the special tokens that are wholly in it."""
    spans = tuple((a - start, b - start) for a, b in whole.special_spans if start <= a and b <= end)
    return MarkedText(whole.text[start:end], spans)
