"""Chat tasks on the embedded model that has a chat template, against transformers' own `apply_chat_template`."""

from typing import Any

import pytest

from data_owner_client import Conversation, Pair, load_task
from data_owner_client.plm.tokenizer import PlmTokenizer
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.model_files.tokenizer import bundle_tokenizer, load_tokenizer
from plm_owner_server.settings import ServerSettings
from tests.chat_templates import FAMILIES
from tests.real_models.test_real_models import PAIRS


@pytest.mark.parametrize("role", ["user", "system"])
def test_prompt_and_target_are_the_conversation_up_to_the_end_of_turn(role: str) -> None:
    owners = load_tokenizer(resolve("smollm2-135m", ServerSettings(_env_file=None).cache_dir).folder)
    tokenizer = PlmTokenizer(bundle_tokenizer(owners))
    builtin = load_task("translate-en-de")
    task = builtin.model_copy(update={"format": "chat", "stop": None, "instruction_role": role})
    turns = [text for shot in builtin.examples for text in (shot.source, shot.target)]
    for pair in PAIRS:
        assert pair.target is not None
        texts = [*turns, pair.source, pair.target]
        roles = ("user", "assistant")
        messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
        if role == "system":
            messages.insert(0, {"role": "system", "content": builtin.instruction})
        else:
            messages[0]["content"] = f"{builtin.instruction}\n\n{messages[0]['content']}"
        prompt, target = task.prompt_and_target(pair, tokenizer)
        prompt_ids = tokenizer.encode_prompt(prompt)
        assert prompt_ids == owners.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        ids = prompt_ids + tokenizer.encode_target(prompt, prompt_ids, target)
        whole = owners.apply_chat_template(messages, return_dict=False)
        assert owners.decode(whole[len(ids) - 1 :]) == "<|im_end|>\n"
        assert ids == whole[: len(ids)]


@pytest.mark.parametrize(("name", "template"), [("smollm2-135m", None), ("gemma-3-270m", FAMILIES["gemma"].template)])
def test_every_turn_of_a_conversation_has_the_ids_of_transformers(name: str, template: Any) -> None:
    """On two real tokenizers. The embedded Gemma has the tokens of turns, and no template."""
    owners = load_tokenizer(resolve(name, ServerSettings(_env_file=None).cache_dir).folder)
    owners.chat_template = template or owners.chat_template
    tokenizer, task = PlmTokenizer(bundle_tokenizer(owners)), load_task("chat")
    end = "<|im_end|>" if template is None else "<end_of_turn>"
    messages = [
        {"role": role, "content": text}
        for pair in PAIRS[:3]
        for role, text in (("user", pair.source), ("assistant", pair.target))
    ]
    for at in (1, 3, 5):
        before = tuple(messages[:at])
        pair = Pair(str(messages[at - 1]["content"]), messages[at]["content"], conversation=Conversation(before))
        prompt, target = task.prompt_and_target(pair, tokenizer)
        prompt_ids = tokenizer.encode_prompt(prompt)
        assert prompt_ids == owners.apply_chat_template(list(before), add_generation_prompt=True, return_dict=False)
        ids = prompt_ids + (tokenizer.joint_target(prompt, prompt_ids, target) or [])
        whole = owners.apply_chat_template(messages[: at + 1], return_dict=False)
        assert ids == whole[: len(ids)]
        assert ids[-1] == owners.convert_tokens_to_ids(end)
        assert not owners.decode(whole[len(ids) :]).strip()
