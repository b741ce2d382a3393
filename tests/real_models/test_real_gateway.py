"""The gateway on the embedded models: its texts and scores are those of `translate` and of transformers."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from data_owner_client import TrainedAdapter, connect, load_task, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.plm.remote_plm import RemotePlm
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.settings import ServerSettings
from tests import guard
from tests.adapters import random_adapter
from tests.gateways import gateway
from tests.processes import parties
from tests.real_models.test_real_models import PAIRS, TEXTS

pytestmark = [pytest.mark.timeout(600), pytest.mark.unguarded("one way to the owner is enough")]

CHATS, PLAIN = "smollm2-135m", "gemma-3-270m"
ADAPTER = "adapted"
_TOKENS = 12


@dataclass(frozen=True)
class Served:
    """A model behind a gateway, the same one in this process, and an adapter."""

    name: str
    url: str
    client: OpenAI
    plm: RemotePlm
    adapter: TrainedAdapter
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=[CHATS, PLAIN])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name, work = request.param, tmp_path_factory.mktemp("owner")
    task = load_task("translate-en-de")
    if name == CHATS:
        task = task.model_copy(update={"format": "chat", "stop": None})
    with ExitStack() as stack:
        owner = stack.enter_context(parties.server(work / "log", "--model", name))
        plm = stack.enter_context(connect(owner, dtype="float32", **guard.credentials()))
        adapter = random_adapter(
            plm, most_candidates=1000, task=task, interpolation=Interpolation(schedule="constant", lambda_max=0.4)
        )
        adapter.save(work / ADAPTER)
        url = stack.enter_context(gateway(owner, {ADAPTER: work / ADAPTER}))
        client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0))
        folder = resolve(name, ServerSettings(_env_file=None).cache_dir).folder
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        yield Served(name, url, client, plm, adapter, model, AutoTokenizer.from_pretrained(folder))


def user(text: str) -> list[Any]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def test_answers_are_those_of_translate(served: Served) -> None:
    sources, bound = [pair.source for pair in PAIRS[:3]], DecodingSettings(max_new_tokens=_TOKENS)
    texts = translate(served.plm, sources, adapter=served.adapter, decoding=bound).texts
    for source, text in zip(sources, texts, strict=True):
        ask: Any = partial(
            served.client.chat.completions.create, model=ADAPTER, messages=user(source), max_tokens=_TOKENS
        )
        assert ask().choices[0].message.content == text
        assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)) == text


@torch.inference_mode()
def test_continuations_of_the_plm_are_those_of_transformers(served: Served) -> None:
    answer = served.client.completions.create(model=served.plm.card.name, prompt=TEXTS, max_tokens=_TOKENS)
    for text, choice in zip(TEXTS, answer.choices, strict=True):
        ids = served.tokenizer(text, return_tensors="pt")
        whole = served.model.generate(**ids, max_new_tokens=_TOKENS, do_sample=False)[0]
        expected = served.tokenizer.decode(whole[ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert choice.text == expected


@torch.inference_mode()
def test_conversations_with_the_plm_are_those_of_its_template(served: Served) -> None:
    messages = [*user("Name a colour."), {"role": "assistant", "content": "Blue."}, *user("And another one?")]
    if served.name == PLAIN:
        with pytest.raises(Exception, match="no chat template"):
            served.client.chat.completions.create(model=served.plm.card.name, messages=messages)
        return
    answer = served.client.chat.completions.create(
        model=served.plm.card.name, messages=messages, max_tokens=_TOKENS, temperature=0
    )
    ids = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    whole = served.model.generate(**ids, max_new_tokens=_TOKENS, do_sample=False)[0]
    expected = served.tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].message.content == expected.strip()


@torch.inference_mode()
def test_scores_of_the_plm_are_those_of_transformers(served: Served) -> None:
    prompts = [served.tokenizer(text).input_ids for text in TEXTS]
    answer = served.client.completions.create(
        model=served.plm.card.name, prompt=prompts, max_tokens=1, logprobs=1, echo=True
    )
    for ids, choice in zip(prompts, answer.choices, strict=True):
        logits_T_V = served.model(input_ids=torch.tensor([ids])).logits[0]
        expected = logits_T_V.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        assert choice.logprobs is not None
        found = json.loads(choice.logprobs.model_dump_json())["token_logprobs"]
        assert len(found) == len(ids) + 1
        assert found[1:-1] == pytest.approx(expected, abs=1e-3)
