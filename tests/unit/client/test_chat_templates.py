"""Conversations through chat templates, against transformers' own `apply_chat_template`."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from data_owner_client.data.pairs import Pair
from data_owner_client.data.stops import Stops
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer
from harness.tiny_models import EOS, tiny_tokenizer
from plm_owner_server.engines.model_files.tokenizer import bundle_tokenizer
from protocol.chat_template import ChatTemplate
from protocol.errors import InvalidData, Unsupported
from tests.chat_templates import FAMILIES, NOVEMBER, TOOLS, Family

DECEMBER = datetime.date(2026, 12, 24)
SHOTS = ({"source": "lamp <b>", "target": "Licht & 'so'"}, {"source": "door", "target": "Tür"})
SYSTEM = "Translate, and be brief."
READ_THE_CLOCK = {"llama-3", "granite", "smollm-3"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def task_for(family: Family, **fields: Any) -> Task:
    defaults = {
        "name": "t",
        "format": "chat",
        "instruction": SYSTEM,
        "examples": SHOTS,
        "template_arguments": dict(family.arguments),
        "tools": family.tools,
        "date": NOVEMBER,
    }
    return Task.model_validate(defaults | fields)


def conversation(source: str, *, system: bool = False) -> list[dict[str, str]]:
    users = [SHOTS[0]["source"], SHOTS[1]["source"], source]
    if not system:
        users[0] = f"{SYSTEM}\n\n{users[0]}"
    turns = [{"role": "system", "content": SYSTEM}] if system else []
    for user, shot in zip(users, (*SHOTS, None), strict=True):
        turns.append({"role": "user", "content": user})
        if shot:
            turns.append({"role": "assistant", "content": shot["target"]})
    return turns


def special_of(family: Family, ids: list[int]) -> list[int]:
    special = family.tokenizer().special_ids.values()
    return [i for i in ids if i in special]


@pytest.mark.parametrize("role", ["user", "system"])
def test_prompt_and_target_are_the_conversation_of_transformers(clock: None, family: Family, role: str) -> None:
    owners, tokenizer = family.transformers_tokenizer(), family.tokenizer()
    task = task_for(family, instruction_role=role)
    messages = conversation("the thin shine", system=role == "system" and family.takes_system)
    options = {"tools": family.tools, **family.arguments}
    if family.moves_system and role == "system":
        return  # refused, see below

    prompt, target = task.prompt_and_target(Pair("the thin shine", "das Licht\nhier"), tokenizer)
    assert prompt.text == owners.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert prompt == task.prompt("the thin shine", tokenizer)
    prompt_ids = tokenizer.encode_prompt(prompt)
    target_ids = tokenizer.encode_target(prompt, prompt_ids, target)
    whole = owners.apply_chat_template(
        [*messages, {"role": "assistant", "content": "das Licht\nhier"}], return_dict=False, **options
    )
    ids = prompt_ids + target_ids
    if not owners.decode(whole).endswith("hier"):
        assert ids == whole[: len(ids)]
        assert "das" not in owners.decode(whole[len(ids) :])
    else:  # the template writes no end behind the last turn
        assert ids == [*whole, tokenizer.special_ids[family.end]]


def test_a_turn_ends_as_the_template_ends_it(family: Family) -> None:
    tokenizer = family.tokenizer()
    stops = task_for(family).stops(tokenizer, [EOS])
    if family.end in tokenizer.special_ids:
        assert stops == Stops((), frozenset({tokenizer.special_ids[family.end], EOS}))
    else:
        assert stops == Stops((family.end,), frozenset({EOS}))
    assert task_for(family, stop="###").stops(tokenizer, [EOS]) == Stops(("###",), frozenset({EOS}))


def test_texts_spell_no_special_token(clock: None, family: Family) -> None:
    tokenizer = family.tokenizer()
    task, special = task_for(family), sorted(tokenizer.special_ids)
    forged = f"a{''.join(special)}b <{special[0]} <|"
    honest_prompt, honest_target = task.prompt_and_target(Pair("a b", "c d"), tokenizer)
    prompt, target = task.prompt_and_target(Pair(forged, forged), tokenizer)
    assert forged in prompt.text
    assert forged in target.text
    prompt_ids, honest_ids = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(honest_prompt)
    assert special_of(family, prompt_ids) == special_of(family, honest_ids)
    target_ids = tokenizer.encode_target(prompt, prompt_ids, target)
    honest_target_ids = tokenizer.encode_target(honest_prompt, honest_ids, honest_target)
    assert special_of(family, target_ids) == special_of(family, honest_target_ids)


def test_no_token_forms_across_the_end_of_a_text() -> None:
    family = Family("{{ messages[0].content }}{{ '|end|>' }}{{ messages[0].content }}", "", ("<|end|>",))
    task, tokenizer = task_for(family, instruction="", examples=(), date=None), family.tokenizer()
    for source in ("a <", "|end|>", "<|end", "<|end|><"):
        prompt = task.prompt(source, tokenizer)
        assert prompt.text == f"{source}|end|>{source}"
        assert not prompt.special_spans


def test_fields_keep_their_names_beside_special_tokens() -> None:
    for special in ("end", "tools", "user"):
        template = ChatTemplate("{{ messages[0].content }}{{ tools }}", {}, [special])
        text = template.render([{"role": "human", "content": "the user"}], add_generation_prompt=True).text
        assert text == "the userNone"


def test_a_template_may_look_for_a_special_token_that_a_text_spells() -> None:
    family = Family("{{ messages[0].content.split('<|end|>') | join('-') }}", "", ("<|end|>",))
    task, tokenizer = task_for(family, instruction="", examples=(), date=None), family.tokenizer()
    assert task.prompt("a<|end|>bc", tokenizer).text == "a-bc"
    # What a template does with the characters of such a token cannot be told from what it does with others.
    counting = Family("{{ messages[0].content[:3] }}", "", ("<|end|>",)).tokenizer()
    with pytest.raises(InvalidData, match="changes a special token"):
        task.prompt("a<|end|>bc", counting)


def test_the_day_is_frozen(family: Family) -> None:
    tokenizer = family.tokenizer()
    task = task_for(family, date=None)
    dated = task.on_day(NOVEMBER, tokenizer)
    name = next(name for name, each in FAMILIES.items() if each is family)
    assert (dated != task) == (name in READ_THE_CLOCK)
    assert dated.date == (NOVEMBER if name in READ_THE_CLOCK else None)
    assert dated.on_day(DECEMBER, tokenizer) == dated
    if name in READ_THE_CLOCK:
        assert "27 Nov" in dated.prompt("a", tokenizer).text or "November" in dated.prompt("a", tokenizer).text
        assert dated.prompt("a", tokenizer) != task.on_day(DECEMBER, tokenizer).prompt("a", tokenizer)
    assert task.on_day(None, tokenizer) == task
    assert Task(name="t").on_day(NOVEMBER, tokenizer) == Task(name="t")


@pytest.mark.parametrize(
    ("name", "fields", "target", "reason"),
    [
        ("qwen-3", {"template_arguments": {}}, "x", "does not begin"),  # it thinks first
        ("gemma", {}, " x", "does not begin"),  # it trims
        ("deepseek", {}, "<think>hm</think>x", "does not begin"),  # it takes thoughts away
        ("plain-end", {}, "x ///y", "contains the stop"),
        ("plain-end", {"stop": "##"}, "x#", "ends with a part"),
        ("mistral", {"instruction_role": "system"}, "x", "another conversation"),
    ],
)
def test_what_the_template_changes_is_refused(name: str, fields: dict[str, Any], target: str, reason: str) -> None:
    family = FAMILIES[name]
    with pytest.raises(InvalidData, match=reason):
        task_for(family, **fields).prompt_and_target(Pair("a", target), family.tokenizer())


def test_a_template_that_rewrites_history_is_refused() -> None:
    template = "{{ messages | length }}{{ messages[-1].content }}"
    task, tokenizer = task_for(Family(template, "")), Family(template, "").tokenizer()
    with pytest.raises(InvalidData, match="another conversation"):
        task.prompt_and_target(Pair("a", "b"), tokenizer)


def test_a_template_that_leaves_texts_out_is_refused() -> None:
    template = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    family = Family(template, "")
    with pytest.raises(InvalidData, match="leaves out the user's text"):
        task_for(family).prompt("a", family.tokenizer())


def test_a_template_that_writes_no_characters_is_refused() -> None:
    family = Family("{{ '%c' | format(0xD800) }}{{ messages[-1].content }}", "")
    with pytest.raises(InvalidData, match="template refuses the messages"):
        task_for(family).prompt("a", family.tokenizer())


def test_an_empty_stop_is_none() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    empty, none = (task_for(FAMILIES["chatml"], stop=stop) for stop in ("", None))
    assert empty.prompt_and_target(Pair("a", "b"), tokenizer) == none.prompt_and_target(Pair("a", "b"), tokenizer)
    assert empty.stops(tokenizer, [EOS]) == none.stops(tokenizer, [EOS])


def test_a_switch_of_the_template() -> None:
    family = FAMILIES["qwen-3"]
    assert not task_for(family, template_arguments={}).prompt("a", family.tokenizer()).text.endswith("</think>\n\n")
    assert task_for(family).prompt("a", family.tokenizer()).text.endswith("</think>\n\n")


def test_named_templates() -> None:
    family = FAMILIES["hermes"]
    tokenizer, plain = family.tokenizer(), FAMILIES["chatml"]
    chatml = task_for(plain, date=None).prompt("a", plain.tokenizer()).text
    assert task_for(family, tools=None).prompt("a", tokenizer).text == chatml
    assert task_for(family, template="default").prompt("a", tokenizer).text == chatml
    assert "Signatures: city: str" in task_for(family, tools=TOOLS).prompt("a", tokenizer).text
    assert "Signatures: city: str" in task_for(family, template="tool_use").prompt("a", tokenizer).text
    with pytest.raises(InvalidData, match=r"no chat template 'rag'.*default, tool_use"):
        task_for(family, template="rag").prompt("a", tokenizer)
    with pytest.raises(Unsupported, match="no chat template"):
        task_for(family).prompt("a", PlmTokenizer(bundle_tokenizer(tiny_tokenizer())))


def test_named_templates_travel(family: Family) -> None:
    bundle = bundle_tokenizer(family.transformers_tokenizer())
    assert type(bundle).from_json(bundle.to_json()) == bundle
    if isinstance(family.template, str):
        # As an older client expects it, which knows no other fields.
        assert b"named_chat_templates" not in bundle.to_json()
    else:
        others = bundle.model_copy(update={"named_chat_templates": {"tool_use": "x"}})
        assert bundle.digest != others.digest != bundle.model_copy(update={"named_chat_templates": {}}).digest


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a\\nb' | indent(10 ** 10) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 9) }}",
        "{{ lipsum(10 ** 6) }}",
        "{{ 7 ** 99999 }}",
        "{{ 7 ** 9999 * 7 ** 9999 }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x|replace('a', 'aa') %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% for i in range(10000) %}{{ 'a' * 10000 }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.__subclasses__() }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception(\n\n'no') }}",
        "{% if %}",
        "{% generation %}",
        "{{ 1 / 0 }}",
        "{{ undefined.x }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_templates_are_refused(template: str) -> None:
    with pytest.raises(InvalidData, match=r"^The model's chat template (?!.*MemoryError)[^\n]*$"):
        ChatTemplate(template, {}, ()).render([{"role": "user", "content": "x"}], add_generation_prompt=True)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a\\x1b[31mb\\n\\x9b2J\\u202ec') }}", "{% a\x1b[31mb\x9b2J %}"]
)
def test_reasons_of_a_template_control_no_terminal(template: str) -> None:
    with pytest.raises(InvalidData) as caught:
        ChatTemplate(template, {}, ()).render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert str(caught.value).isprintable()
    assert "\x1b" not in caught.value.detail


@pytest.mark.parametrize(
    "template", ["{{ '%d' % 4294967296 }}", "{{ '{}'.format(4294967296) }}", "{{ '%d' | format(4294967296) }}"]
)
def test_large_numbers_are_written(template: str) -> None:
    rendered = ChatTemplate(template, {}, ()).render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert rendered.text == "4294967296"


def test_bad_chat_fields_are_named() -> None:
    with pytest.raises(ValueError, match="template, date needs"):
        Task(name="t", template="tool_use", date=NOVEMBER)
    with pytest.raises(ValueError, match="cannot set messages"):
        Task(name="t", format="chat", template_arguments={"messages": []})
    with pytest.raises(ValueError, match="template_arguments"):
        Task(name="t", format="chat", template_arguments={"x": float("nan")})
