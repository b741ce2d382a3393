"""Chat templates and texts at random, against transformers' own `apply_chat_template`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.plm.tokenizer import PlmTokenizer
from harness.tiny_models import tiny_tokenizer
from protocol.chat_template import ChatTemplate
from protocol.errors import InvalidData
from tests.chat_templates import FAMILIES
from tests.profiles import scaled

# The clock of transformers cannot be frozen for each example.
TIMELESS = sorted(set(FAMILIES) - {"llama-3", "granite", "smollm-3"})
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = ["<|im_end|>", "<eos>", "<|", "|>", "<|end", "im_end|>", "<bos", "[INST]", "<think>", "</think>", " ", "\n"]
SPELLINGS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join)
# Pieces of templates, most of which make no whole.
PIECES = """{% for m in messages %}@{% endfor %}@{% if loop.last %}@{% endif %}@{% else %}@{% break %}@{% continue %}@
@{{ m.content }}@{{ m['role'] }}@{{- @ -}}@{% set x = @ %}@{{ x }}@{{ loop.length }}@{{ loop.nextitem }}@namespace(a=1)
@{% generation %}@{% endgeneration %}@{{ messages | tojson }}@{{ tools is none }}@{{ eos_token }}@{#@#}@{{ '<b>' }}@  @
@{{ raise_exception('no') }}@{{ messages[-1].content | trim }}@{{ 'a' * 3 ~ [1] + [2] }}@{{ dict(a=1) }}@{{ 1 // 0 }}
@{% macro f(x) %}@{% endmacro %}@{{ f(1) }}@{{ messages | map(attribute='content') | join }}@{{ 2 ** 9 % 7 }}
@{% for a in b recursive %}"""
SOURCES = st.lists(st.one_of(st.sampled_from(PIECES.split("@")), TEXTS), max_size=12).map("".join)


@cache
def tokenizers(name: str) -> tuple[PreTrainedTokenizerFast, PlmTokenizer]:
    return FAMILIES[name].transformers_tokenizer(), FAMILIES[name].tokenizer()


def task_for(name: str, **fields: Any) -> Task:
    family = FAMILIES[name]
    fields = {"template_arguments": dict(family.arguments), "tools": family.tools} | fields
    return Task.model_validate({"name": "t", "format": "chat"} | fields)


@settings(max_examples=scaled(600))
@given(name=st.sampled_from(TIMELESS), source=TEXTS, target=TEXTS)
def test_prompt_and_target_are_the_conversation_or_refused(name: str, source: str, target: str) -> None:
    owners, tokenizer = tokenizers(name)
    family = FAMILIES[name]
    messages = [{"role": "user", "content": source}]
    options = {"tools": family.tools, **family.arguments}
    prompt = task_for(name).prompt(source, tokenizer)
    assert prompt.text == owners.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    prompt_ids = tokenizer.encode_prompt(prompt)
    assert prompt_ids == owners.apply_chat_template(messages, return_dict=False, add_generation_prompt=True, **options)
    try:
        same, behind = task_for(name).prompt_and_target(Pair(source, target), tokenizer)
    except InvalidData:
        assert target != target.strip() or target == "" or " ///" in f"{target} //"
        return
    assert same == prompt
    whole_ids = owners.apply_chat_template(
        [*messages, {"role": "assistant", "content": target}], return_dict=False, **options
    )
    ids = tokenizer.encode_prompt(prompt + behind)
    # Behind the last turn, GLM-4 writes no end.
    assert ids == (whole_ids[: len(ids)] if name != "glm-4" else [*whole_ids, tokenizer.special_ids[family.end]])


@settings(max_examples=scaled(600))
@given(name=st.sampled_from(sorted(FAMILIES)), spelling=SPELLINGS, target=SPELLINGS)
def test_spelled_tokens_stay_text(name: str, spelling: str, target: str) -> None:
    _, tokenizer = tokenizers(name)
    special = set(tokenizer.special_ids.values())
    task = task_for(name)
    try:
        prompt, behind = task.prompt_and_target(Pair(f"a{spelling}a", f"a{target}a"), tokenizer)
    except InvalidData:
        assume(False)
    honest, honest_behind = task.prompt_and_target(Pair("aa", "aa"), tokenizer)
    for one, other in ((prompt, honest), (prompt + behind, honest + honest_behind)):
        ids, honest_ids = tokenizer.encode_prompt(one), tokenizer.encode_prompt(other)
        assert [i for i in ids if i in special] == [i for i in honest_ids if i in special]
    assert f"a{spelling}a" in prompt.text
    assert f"a{target}a" in behind.text


@settings(max_examples=scaled(2000))
@given(source=SOURCES, text=TEXTS)
def test_any_template_is_rendered_as_transformers_does_or_refused(source: str, text: str) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    owners = tiny_owner()
    try:
        expected = owners.apply_chat_template(messages, chat_template=source, tokenize=False)
    except Exception:  # noqa: BLE001  (whatever the template raises)
        with pytest.raises(InvalidData, match=r"^The model's chat template"):
            ChatTemplate(source, owners.special_tokens_map, []).render(messages, add_generation_prompt=False)
        return
    rendered = ChatTemplate(source, owners.special_tokens_map, ["<eos>"]).render(messages, add_generation_prompt=False)
    assert rendered.text == expected


@cache
def tiny_owner() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()
