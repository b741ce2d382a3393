"""Conversations of several turns as prompts and targets, against transformers' own `apply_chat_template`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data_owner_client.data.example_retrieval import ExampleRetriever, with_retrieved_examples
from data_owner_client.data.pairs import Conversation, Pair, Source, text_of
from data_owner_client.data.reading.problems import InvalidText
from data_owner_client.data.tasks import Shot, Task
from data_owner_client.decoding.failures import TextFailures
from data_owner_client.memory.tokenized_pairs import TokenizedPair, tokenize_pair
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from data_owner_client.scoring.scorers import references_of
from harness.tiny_models import EOS
from protocol.errors import InvalidData
from tests.chat_templates import FAMILIES, NOVEMBER, TOOLS, Family
from tests.tool_templates import TOOL_FAMILIES

SYSTEM = {"role": "system", "content": "Be brief & kind."}
TALK = (
    {"role": "user", "content": "the thin shine"},
    {"role": "assistant", "content": "das Licht\nhier"},
    {"role": "user", "content": "and <b>?"},
    {"role": "assistant", "content": "Tür & 'so'"},
    {"role": "user", "content": "last"},
    {"role": "assistant", "content": "gut"},
)


def call(number: int, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": f"call0000{number}", "type": "function", "function": function}


TOOL_TALK = (
    {"role": "user", "content": "How is Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [call(1, "Röm <b> & 'x'")]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call00001", "name": "weather"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "And Bonn?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call(2, "Bonn")]},
    {"role": "tool", "content": "", "tool_call_id": "call00002", "name": "weather"},
    {"role": "assistant", "content": "Rain."},
)


def chat_task(family: Family, **fields: Any) -> Task:
    defaults = {"template_arguments": dict(family.arguments), "tools": family.tools, "date": NOVEMBER}
    return Task.model_validate({"name": "t", "kind": "chat"} | defaults | fields)


def answers(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> list[tuple[int, Pair]]:
    """Each turn of the assistant as a pair, and its index."""
    return [
        (
            at,
            Pair(
                messages[at - 1]["content"],
                message["content"],
                conversation=Conversation(tuple(messages[:at])),
                reply=message if "tool_calls" in message else None,
            ),
        )
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def folded(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the system's text before the user's."""
    system, user, *others = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *others]


def assert_ids_are_those_of_transformers(family: Family, task: Task, messages: Sequence[dict[str, Any]]) -> None:
    """Compare the ids of every turn's prompt and target with those of the conversation up to the turn's end."""
    owners, tokenizer = family.transformers_tokenizer(), family.tokenizer()

    def ids_of(turns: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        turns = folded(turns) if turns[0]["role"] == "system" and not family.takes_system else turns
        options |= {"tools": family.tools, **family.arguments}
        return list(owners.apply_chat_template(list(turns), return_dict=False, **options))

    found = answers(messages)
    assert len(found) >= 3
    for at, pair in found:
        prompt, target = task.prompt_and_target(pair, tokenizer)
        assert prompt == task.prompt(pair.question, tokenizer)
        prompt_ids = tokenizer.encode_prompt(prompt)
        assert prompt_ids == ids_of(messages[:at], add_generation_prompt=True)
        target_ids = tokenizer.joint_target(prompt, prompt_ids, target)
        assert target_ids is not None
        whole_ids, ids = ids_of(messages[: at + 1]), prompt_ids + target_ids
        if family.end in ("<|user|>", "<|observation|>"):  # no end is written behind the last turn
            assert ids[:-1] == whole_ids
        else:
            assert ids == whole_ids[: len(ids)]
            # Nothing of the turn is left: what follows is space, or the end of the whole sequence.
            assert not owners.decode(whole_ids[len(ids) :]).replace("<eos>", "").strip()
        decoded = tokenizer.decode_continuation(target_ids)
        assert decoded.removesuffix(family.end).strip() == task.reference(pair, tokenizer)


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_has_the_ids_of_transformers(clock: None, name: str, system: bool) -> None:
    family = FAMILIES[name]
    messages = (SYSTEM, *TALK) if system else TALK
    if family.moves_system and system:
        return  # refused, as in test_chat_templates.py
    assert_ids_are_those_of_transformers(family, chat_task(family), messages)


@pytest.mark.parametrize("name", TOOL_FAMILIES)
def test_tool_calls_and_results_have_the_ids_of_transformers(name: str) -> None:
    family = TOOL_FAMILIES[name]
    assert_ids_are_those_of_transformers(family, chat_task(family), TOOL_TALK)


def end_of(family: Family, pair: Pair) -> str:
    _, target = chat_task(family).prompt_and_target(pair, family.tokenizer())
    return target.text[slice(*target.special_spans[-1])]


def test_calls_end_as_the_template_ends_them() -> None:
    ends = {
        name: [end_of(family, pair) for _, pair in answers(TOOL_TALK)]
        for name, family in TOOL_FAMILIES.items()
        if name != "plain-end"
    }
    assert ends == {
        "hermes": ["<|im_end|>"] * 4,
        "llama-3.1": ["<|eom_id|>", "<|eot_id|>"] * 2,
        "mistral": ["<eos>"] * 4,
        "glm-4": ["<|observation|>", "<|user|>"] * 2,
        "gemma-4": ["<|tool_response>", "<turn|>"] * 2,
    }


def test_a_conversation_brings_its_own_tools() -> None:
    family = TOOL_FAMILIES["hermes"]
    tokenizer, other = family.tokenizer(), [{"type": "function", "function": {"name": "clock"}}]
    turns = TALK[:1]
    owners = family.transformers_tokenizer()
    for task_tools, own_tools, expected in ((None, other, other), (TOOLS, other, other), (TOOLS, None, TOOLS)):
        prompt = chat_task(family, tools=task_tools).prompt(
            Conversation(turns, None if own_tools is None else tuple(own_tools)), tokenizer
        )
        assert prompt.text == owners.apply_chat_template(
            list(turns), tools=expected, tokenize=False, add_generation_prompt=True
        )


def test_own_tools_choose_the_template_for_tools() -> None:
    family = FAMILIES["hermes"]
    tokenizer, task = family.tokenizer(), chat_task(family, tools=None)
    assert "Signatures" in task.prompt(Conversation(TALK[:1], tuple(TOOLS)), tokenizer).text
    assert "Signatures" not in task.prompt(Conversation(TALK[:1]), tokenizer).text


def test_the_day_is_frozen_for_the_template_of_tools_too() -> None:
    family = Family({"default": "{{ messages[0].content }}", "tool_use": "{{ strftime_now('%d') }}"}, "")
    tokenizer = family.tokenizer()
    assert Task(name="t", kind="chat").on_day(NOVEMBER, tokenizer).date == NOVEMBER
    assert Task(name="t", kind="chat", template="default").on_day(NOVEMBER, tokenizer).date is None


def test_arguments_of_calls_may_be_json_text() -> None:
    """OpenAI's API has text where transformers' templates expect an object."""
    family = TOOL_FAMILIES["hermes"]
    tokenizer, task = family.tokenizer(), chat_task(family)
    texts = json.loads(json.dumps(TOOL_TALK))
    for message in texts:
        for one in message.get("tool_calls", ()):
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    for (_, pair), (_, other) in zip(answers(TOOL_TALK), answers(texts), strict=True):
        assert task.prompt_and_target(pair, tokenizer) == task.prompt_and_target(other, tokenizer)


def test_a_call_without_arguments_has_no_argument() -> None:
    family = TOOL_FAMILIES["hermes"]
    tokenizer, task = family.tokenizer(), chat_task(family)
    whole = []
    spellings: list[dict[str, Any]] = [{"arguments": {}}, {"arguments": ""}, {"arguments": None}, {}]
    for arguments in spellings:
        call = {"type": "function", "function": {"name": "clock", **arguments}}
        reply = {"role": "assistant", "content": "", "tool_calls": [call]}
        whole.append(task.prompt_and_target(Pair("a", "", reply=reply), tokenizer))
    assert whole == [whole[0]] * 4
    assert '"arguments": {}' in whole[0][1].text


def test_a_later_system_turn_that_the_template_leaves_out_is_refused() -> None:
    family = TOOL_FAMILIES["hermes"]
    talk = Conversation(
        ({"role": "user", "content": "a"}, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"})
    )
    with pytest.raises(InvalidData, match="leaves out a later system turn"):
        chat_task(family).prompt(talk, family.tokenizer())
    assert "Be brief." in chat_task(FAMILIES["chatml"]).prompt(talk, FAMILIES["chatml"].tokenizer()).text


def turns_of(task: Task, source: str | Conversation) -> list[tuple[str, str]]:
    """Role and text of each turn of a prompt in ChatML."""
    text = task.prompt(source, FAMILIES["chatml"].tokenizer()).text
    parts = [part.split("<|im_end|>")[0].split("\n", 1) for part in text.split("<|im_start|>")[1:]]
    return [(role, content) for role, content in parts][:-1]


def test_a_system_turn_stands_in_the_place_of_the_instruction() -> None:
    for role, expected in (
        ("user", [("user", "Answer.\n\nthe thin shine")]),
        ("system", [("system", "Answer."), ("user", "the thin shine")]),
    ):
        task = Task(name="t", kind="chat", instruction="Answer.", instruction_role=role)
        assert turns_of(task, "the thin shine") == expected
        assert turns_of(task, Conversation(TALK[:1])) == expected
        assert turns_of(task, Conversation((SYSTEM, *TALK[:1]))) == [
            ("system", SYSTEM["content"]),
            ("user", "the thin shine"),
        ]
        assert turns_of(task, Conversation(TALK[:3]))[: len(expected)] == expected


def test_examples_come_before_a_single_question_only() -> None:
    task = Task(name="t", kind="chat", examples=(Shot(source="lamp", target="Licht"),))
    shots = [("user", "lamp"), ("assistant", "Licht")]
    question = ("user", "the thin shine")
    assert turns_of(task, "the thin shine") == [*shots, question]
    assert turns_of(task, Conversation(TALK[:1])) == [*shots, question]
    assert turns_of(task, Conversation((SYSTEM, *TALK[:1]))) == [("system", SYSTEM["content"]), *shots, question]
    assert turns_of(task, Conversation(TALK[:3])) == [(turn["role"], turn["content"]) for turn in TALK[:3]]
    assert turns_of(task, Conversation(TALK[:1], tuple(TOOLS))) == [question]


def test_retrieved_examples_come_before_a_single_question_only() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    limits = SimpleNamespace(max_sequence_tokens=10_000)
    plm = cast(RemotePlm, SimpleNamespace(tokenizer=tokenizer, card=SimpleNamespace(limits=limits)))
    retriever = ExampleRetriever([Pair("lamp", "Licht"), *(pair for _, pair in answers(TALK))], 9)
    task = Task(name="t", kind="chat")
    sources: list[Source] = [Conversation(TALK[:3]), "a lamp", Conversation((SYSTEM, TALK[0])), Conversation(TALK[:1])]
    tasks = with_retrieved_examples(plm, task, sources, retriever)
    assert tasks[0] is task
    assert [[shot.source for shot in each.examples] for each in tasks[1:]] == [
        ["the thin shine", "lamp"],
        ["lamp", "the thin shine"],
        ["lamp"],  # no answer of the same conversation
    ]
    assert turns_of(tasks[2], sources[2]) == [
        ("system", SYSTEM["content"]),
        *(("user", "lamp"), ("assistant", "Licht")),
        *(("user", TALK[0]["content"]), ("assistant", TALK[1]["content"])),
        ("user", TALK[0]["content"]),
    ]


def tokenized(family: Family, pair: Pair) -> TokenizedPair:
    card = SimpleNamespace(eos_token_ids=[EOS])
    plm = cast(RemotePlm, SimpleNamespace(tokenizer=family.tokenizer(), card=card))
    return tokenize_pair(plm, chat_task(family), pair)


def test_pairs_of_calls_and_empty_results_have_tokens() -> None:
    family = TOOL_FAMILIES["hermes"]
    owners = family.transformers_tokenizer()
    for at, pair in answers(TOOL_TALK):
        whole = owners.apply_chat_template(list(TOOL_TALK[: at + 1]), tools=TOOLS, return_dict=False)
        tokens = tokenized(family, pair)
        assert [*tokens.prompt, *tokens.target] == whole[: len(tokens.prompt) + len(tokens.target)]
        assert tokens.source_tokens == len(owners(pair.source, add_special_tokens=False).input_ids)


def test_an_answer_that_a_stop_would_cut_is_refused() -> None:
    """A call that the model could never write: it ends at its first stop."""
    template = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls %}"
        "{{ eos_token + call.function.name }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    )
    family = Family(template, "<|im_end|>", ("<|im_end|>",))
    first, second = (pair for _, pair in answers(TOOL_TALK[:4]))
    with pytest.raises(InvalidText, match="a stop of this model before its end"):
        tokenized(family, first)
    with pytest.raises(InvalidText, match="no target"):
        tokenized(family, replace(first, target=None, reply=None))
    with pytest.raises(InvalidText, match="an empty target"):
        tokenized(family, replace(second, target=" "))


def test_an_end_that_the_model_does_not_stop_at_is_refused() -> None:
    family = TOOL_FAMILIES["llama-3.1"]  # here without `<|eom_id|>` among the stops of the model
    with pytest.raises(InvalidText, match="does not end with a stop of this model"):
        tokenized(family, answers(TOOL_TALK)[0][1])


def test_a_refused_system_turn_goes_before_the_first_users_text() -> None:
    family = FAMILIES["gemma"]
    tokenizer, task = family.tokenizer(), chat_task(family)
    prompt = task.prompt(Conversation((SYSTEM, *TALK[:3])), tokenizer)
    assert prompt.text.startswith("<bos><start_of_turn>user\nBe brief & kind.\n\nthe thin shine<end_of_turn>")


def test_a_plain_task_shows_single_questions_only() -> None:
    tokenizer: PlmTokenizer = FAMILIES["chatml"].tokenizer()
    task = Task(name="t")
    single = Conversation((SYSTEM, *TALK[:1]))
    assert task.prompt(single, tokenizer) == task.prompt("Be brief & kind.\n\nthe thin shine", tokenizer)
    with pytest.raises(InvalidText, match="earlier turns of its conversation") as turns:
        task.prompt(Conversation(TALK[:3]), tokenizer)
    assert 'kind = "chat"' in turns.value.hint
    with pytest.raises(InvalidText, match="tools of its own"):
        task.prompt(Conversation(TALK[:1], tuple(TOOLS)), tokenizer)
    with pytest.raises(InvalidText, match="more than text"):
        task.prompt_and_target(Pair("a", "", reply=TOOL_TALK[1]), tokenizer)


@pytest.mark.parametrize(
    ("name", "turns", "reply", "reason"),
    [
        ("chatml", TALK[:2], TALK[1], "ends with a turn of the assistant"),
        ("chatml", (SYSTEM,), TALK[1], "ends with a turn of the system"),
        ("chatml", TALK[:1], TOOL_TALK[1], "leaves out 'weather'"),
        ("hermes", TALK[:1], {**TOOL_TALK[1], "tool_calls": [{"function": {}}]}, "refuses the messages"),
        ("hermes", TALK[:1], {"role": "assistant", "content": "a", "tool_calls": ["x"]}, "refuses the messages"),
        ("gemma", (TALK[0], TALK[0]), None, "Roles must alternate"),
    ],
)
def test_what_cannot_be_written_is_refused(
    name: str, turns: tuple[dict[str, Any], ...], reply: dict[str, Any] | None, reason: str
) -> None:
    family = TOOL_FAMILIES.get(name) or FAMILIES[name]
    pair = Pair("a", "", conversation=Conversation(turns), reply=reply)
    with pytest.raises(InvalidData, match=reason):
        chat_task(family).prompt_and_target(pair, family.tokenizer())


def test_a_call_without_an_end_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls else eos_token }}"
        "{% endfor %}"
    )
    family = Family(template, "<eos>")
    with pytest.raises(InvalidData, match="writes no end behind"):
        chat_task(family, date=None).prompt_and_target(answers(TOOL_TALK)[0][1], family.tokenizer())


def test_a_chat_task_has_the_format_of_chats() -> None:
    assert Task(name="t", kind="chat").format == "chat"
    with pytest.raises(ValueError, match='kind = "chat" needs format = "chat"; leave the format away'):
        Task(name="t", kind="chat", format="plain")


def test_the_text_of_a_conversation_is_that_of_the_turn_to_answer() -> None:
    assert text_of(Conversation(TALK[:3])) == "and <b>?"
    assert text_of(Conversation((SYSTEM, *TALK[:3]))) == "and <b>?"
    # As if it were one text.
    assert text_of(Conversation((SYSTEM, TALK[0]))) == "Be brief & kind.\n\nthe thin shine"
    assert text_of(Conversation(({"role": "system", "content": " "}, TALK[0]))) == text_of("the thin shine")


def test_blank_questions_are_not_asked() -> None:
    blank = {"role": "user", "content": " "}
    sources: list[Source] = [Conversation((*TALK[:2], blank)), Conversation(TOOL_TALK[:7]), " ", "a"]
    assert TextFailures(sources, None).each(lambda number, source: number) == [1, 3]


def test_references_of_calls_are_as_the_model_writes_them() -> None:
    family = TOOL_FAMILIES["hermes"]
    task, tokenizer = chat_task(family), family.tokenizer()
    (_, calling), (_, answer) = answers(TOOL_TALK)[2:]
    written = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    assert references_of(calling, task, tokenizer) == (written,)
    assert references_of(answer, task, tokenizer) == references_of(answer) == ("Rain.",)
    with pytest.raises(InvalidText, match="tool calls, whose text depends on the model"):
        references_of(calling)


@pytest.mark.parametrize(
    "turns", [(), ({"content": "a"},), ("a",), ({"role": "user"},), ({"role": "user", "content": None}, *TALK[:1])]
)
def test_turns_have_roles_and_contents(turns: Any) -> None:
    with pytest.raises(InvalidText, match="without turns that have roles and contents"):
        Conversation(turns)


def test_a_reply_has_a_content_or_calls() -> None:
    with pytest.raises(InvalidText, match="a reply without a role or content"):
        Pair("a", "b", reply={"role": "assistant"})
    calls = {"role": "assistant", "content": None, "tool_calls": [call(1, "Rome")]}
    assert Pair("a", "b", conversation=Conversation((*TALK[:1], calls, *TALK[:1])), reply=calls).reply == calls
