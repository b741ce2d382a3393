"""Conversations at random, against transformers' own `apply_chat_template`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data_owner_client.data.pairs import Conversation, Pair
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import InvalidData
from tests.chat_templates import FAMILIES
from tests.fuzz.test_chat_templates import SPELLINGS, TEXTS, TIMELESS, task_for, tokenizers
from tests.profiles import scaled
from tests.tool_templates import TOOL_FAMILIES

# One of the templates writes six turns at most.
_MOST_TURNS = 6


@st.composite
def conversations(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[dict[str, Any]]:
    """Turns of user and assistant one after another, perhaps behind a system turn; the last is the assistant's."""
    system = draw(st.none() | texts)
    contents = draw(st.lists(texts, min_size=2, max_size=_MOST_TURNS - 2))
    contents = contents[: len(contents) // 2 * 2]
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def folded(messages: Sequence[dict[str, Any]], *, takes_system: bool) -> list[dict[str, Any]]:
    """The messages as a template without system turns gets them."""
    if takes_system or messages[0]["role"] != "system":
        return list(messages)
    system, user, *others = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]


def pair_of(messages: Sequence[dict[str, Any]]) -> Pair:
    *before, reply = messages
    conversation = Conversation(tuple(before))
    rich = reply if "tool_calls" in reply else None
    return Pair(before[-1]["content"], reply["content"], conversation=conversation, reply=rich)


@settings(max_examples=scaled(600))
@given(name=st.sampled_from(TIMELESS), messages=conversations(TEXTS))
def test_every_turn_is_that_of_transformers_or_refused(name: str, messages: list[dict[str, Any]]) -> None:
    owners, tokenizer = tokenizers(name)
    assume(not any(token in message["content"] for token in tokenizer.special_ids for message in messages))
    family, task = FAMILIES[name], task_for(name, kind="chat")
    options = {"tools": family.tools, **family.arguments}
    before = folded(messages[:-1], takes_system=family.takes_system)
    prompt = task.prompt(Conversation(tuple(messages[:-1])), tokenizer)
    assert prompt.text == owners.apply_chat_template(before, tokenize=False, add_generation_prompt=True, **options)
    prompt_ids = tokenizer.encode_prompt(prompt)
    assert prompt_ids == owners.apply_chat_template(before, return_dict=False, add_generation_prompt=True, **options)
    target = messages[-1]["content"]
    try:
        same, behind = task.prompt_and_target(pair_of(messages), tokenizer)
    except InvalidData:
        moved = family.moves_system and messages[0]["role"] == "system"
        assert moved or target != target.strip() or target == "" or " ///" in f"{target} //"
        return
    assert same == prompt
    whole_ids = owners.apply_chat_template([*before, messages[-1]], return_dict=False, **options)
    ids = tokenizer.encode_prompt(prompt + behind)
    # Behind the last turn, GLM-4 writes no end.
    assert ids == (whole_ids[: len(ids)] if name != "glm-4" else [*whole_ids, tokenizer.special_ids[family.end]])


def special_ids(tokenizer: PlmTokenizer, task: Task, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The special tokens of a pair's prompt and target."""
    prompt, target = task.prompt_and_target(pair_of(messages), tokenizer)
    special = set(tokenizer.special_ids.values())
    return [i for i in tokenizer.encode_prompt(prompt + target) if i in special]


@settings(max_examples=scaled(400))
@given(name=st.sampled_from(sorted(FAMILIES)), messages=conversations(SPELLINGS.map("a{}a".format)))
def test_no_turn_spells_a_special_token(name: str, messages: list[dict[str, Any]]) -> None:
    _, tokenizer = tokenizers(name)
    task = task_for(name, kind="chat")
    contents = list(dict.fromkeys(message["content"] for message in messages))  # equal ones stay equal
    honest = [{**message, "content": f"a{contents.index(message['content'])}a"} for message in messages]
    try:
        found = special_ids(tokenizer, task, messages)
    except InvalidData:
        assume(False)
    assert found == special_ids(tokenizer, task, honest)


KEYS = TEXTS | SPELLINGS
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | KEYS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(KEYS, values, max_size=3),
    max_leaves=6,
)


def calling(arguments: dict[str, Any], result: str) -> list[dict[str, Any]]:
    """A conversation in which the assistant calls a tool, and answers."""
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "call00001"},
        {"role": "assistant", "content": "So."},
    ]


@settings(max_examples=scaled(400))
@given(
    name=st.sampled_from(sorted(TOOL_FAMILIES)),
    arguments=st.dictionaries(KEYS, JSON_VALUES, max_size=3),
    result=KEYS,
    turns=st.sampled_from([2, 4]),
)
def test_any_call_is_written_as_transformers_does(
    name: str, arguments: dict[str, Any], result: str, turns: int
) -> None:
    family, (owners, tokenizer) = TOOL_FAMILIES[name], tool_tokenizers(name)
    task = Task.model_validate({"name": "t", "kind": "chat", "tools": family.tools})
    messages = calling(arguments, result)[:turns]
    options = {"tools": family.tools, "tokenize": False}
    before = owners.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    whole = owners.apply_chat_template(messages, **options)
    try:
        prompt, behind = task.prompt_and_target(pair_of(messages), tokenizer)
    except InvalidData:
        # The end of a turn, or a text that a filter of the template handles, is a part of the texts.
        assert name == "plain-end" or any(token in whole for token in ("eos", "im_end", "bos", "INST"))
        assume(False)
    assert prompt.text == before
    text = (prompt + behind).text
    if name == "glm-4":
        assert text.removeprefix(whole) in ("<|observation|>", "<|user|>")
    else:
        assert whole.startswith(text)
        assert not whole.removeprefix(text).strip()
    assert special_ids(tokenizer, task, messages) == special_ids(tokenizer, task, calling({}, "")[:turns])


@cache
def tool_tokenizers(name: str) -> tuple[PreTrainedTokenizerFast, PlmTokenizer]:
    return TOOL_FAMILIES[name].transformers_tokenizer(), TOOL_FAMILIES[name].tokenizer()
