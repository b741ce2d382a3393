"""Echoed prompts with log-probabilities, as lm-evaluation-harness reads them."""

from __future__ import annotations

import logging
import random
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from transformers import AutoModelForCausalLM

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.decode_loop import PLM_ONLY
from data_owner_client.gateway.openai.bodies import CompletionBody
from data_owner_client.gateway.openai.errors import ApiError
from data_owner_client.gateway.openai.requests import completion_request
from data_owner_client.gateway.openai.responses import AnswerHead
from data_owner_client.gateway.scoring import EchoScorer, is_scoring
from data_owner_client.gateway.special_texts import spelled_prompt
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer
from harness.tiny_models import BOS, EOS, TinyModels
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from tests import support
from tests.adapters import adapter_card
from tests.profiles import scaled
from tests.small_tokenizers import KINDS, bundle

TASK = Task(name="t", source_label="In", target_label="Out")
CONSTANT = Interpolation(schedule="constant", lambda_max=0.7)


def parse_logprobs(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Log-likelihood and greedy flag of each continuation.

    The rule of `LocalCompletionsAPI.parse_logprobs` in `lm_eval/models/openai_completions.py` of
    EleutherAI/lm-evaluation-harness at 4e7e0d47, in other words.
    """
    found = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), context_lengths, strict=True):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        top = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(own), all(one == max(each.values()) for one, each in zip(own, top, strict=True))))
    return found


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def plm(folder: Path) -> RemotePlm:
    return RemotePlm(InProcessConnection(support.make_service(folder)), dtype="float32", cache=None)


@pytest.fixture(scope="module")
def adapter(plm: RemotePlm) -> TrainedAdapter:
    ids_C = torch.arange(3, 270, 4)
    head, network = plm.head_rows(ids_C), Adapter(plm.card.hidden_size, 4, "residual")
    torch.manual_seed(3)
    for weight in network.parameters():
        weight.data = 0.3 * torch.randn(weight.shape)
    card = adapter_card(ModelIdentity.from_card(plm.card), head, task=TASK, rank=4)
    return TrainedAdapter(card, network.eval(), ids_C, head)


def answer(plm: Any, prompt: Any, adapter: Any = None, interpolation: Any = PLM_ONLY, **fields: Any) -> dict[str, Any]:
    """The answer to a request as the harness sends it, through JSON's own types."""
    fields = {"model": "m", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True} | fields
    request = completion_request(CompletionBody.model_validate({"prompt": prompt, **fields}))
    assert is_scoring(request)
    choices, usage = EchoScorer(plm).answer(request, adapter, interpolation)
    return AnswerHead("m", chat=False).whole(choices, usage)


@settings(max_examples=scaled(40))
@given(st.integers(0, 2**31), st.booleans(), st.integers(1, 4))
def test_the_harness_reads_exact_likelihoods(
    plm: RemotePlm, folder: Path, adapter: TrainedAdapter, seed: int, adapted: bool, count: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    chosen = random.Random(seed)
    prompts = support.random_ids(seed, [chosen.randint(2, 16) for _ in range(count)])
    contexts = [chosen.randint(1, len(ids) - 1) for ids in prompts]
    used = (adapter, CONSTANT) if adapted else (None, PLM_ONLY)
    for ids, length in zip(prompts, contexts, strict=True):
        if chosen.random() < 0.5:  # a greedy continuation
            del ids[length:]
            for _ in range(3):
                ids.append(int(mixture(plm, model, [BOS, *ids], *used)[-1].argmax()))
    body = answer(plm, prompts, *used)
    found = parse_logprobs(body, contexts)
    for ids, length, choice, (logprob, is_greedy) in zip(prompts, contexts, body["choices"], found, strict=True):
        logprob_N_V = mixture(plm, model, [BOS, *ids], *used)[:-1]
        expected_N = logprob_N_V[torch.arange(len(ids)), torch.tensor(ids)]
        assert logprob == pytest.approx(float(expected_N[length:].sum()), abs=1e-4)
        assert is_greedy == (logprob_N_V[length:].argmax(-1).tolist() == ids[length:])
        # The tokenizer puts a start before a text, so the first token has a log-probability, too.
        assert choice["logprobs"]["token_logprobs"][:-1] == pytest.approx(expected_N.tolist(), abs=1e-4)
        assert {len(part) for part in choice["logprobs"].values()} == {len(ids) + 1}


@torch.inference_mode()
def mixture(plm: RemotePlm, model: Any, ids: list[int], adapter: Any, interpolation: Interpolation) -> torch.Tensor:
    """log P behind each token [N, V], float64."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    p_N_V = out.logits[0].softmax(-1)
    if adapter is not None:
        pema_N_V = torch.zeros_like(p_N_V)
        pema_N_V[:, adapter.candidate_ids_C] = adapter.logprobs(out.hidden_states[-1][0].float()).double().exp()
        p_N_V = (1 - interpolation.lambda_max) * p_N_V + interpolation.lambda_max * pema_N_V
    logprob_N_V: torch.Tensor = p_N_V.log()
    return logprob_N_V


@pytest.mark.parametrize("text", ["In: the thin\nOut: die", "é<bos>ü <eos>", "<bos>an", "🙂"])
def test_texts_are_scored_as_their_ids_are(plm: RemotePlm, adapter: TrainedAdapter, text: str) -> None:
    ids = plm.tokenizer.encode_prompt(spelled_prompt(text, plm.tokenizer, with_special_tokens=False))
    by_text, by_ids = (answer(plm, prompt, adapter, CONSTANT) for prompt in (text, ids))
    assert by_text["choices"] == by_ids["choices"]
    (choice,) = by_text["choices"]
    assert Completion.model_validate(by_text | {"choices": [choice | {"logprobs": None}]})
    assert by_text["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
    logprobs = choice["logprobs"]
    assert (logprobs["token_logprobs"][0] is None) == (logprobs["top_logprobs"][0] is None) == (ids[0] == BOS)
    assert choice["text"].startswith(text)
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0
    assert offsets[-1] == len(text)
    for at, (token, offset) in enumerate(zip(logprobs["tokens"][:-1], offsets, strict=False)):
        if not token.startswith("bytes:"):
            assert text[offset:].startswith(token), at


def test_ids_may_begin_with_the_start_of_a_sequence(plm: RemotePlm) -> None:
    ids = support.random_ids(2, [6])[0]
    with_start, without = (answer(plm, prompt)["choices"][0]["logprobs"] for prompt in ([BOS, *ids], ids))
    assert with_start["token_logprobs"][0] is None
    assert with_start["token_logprobs"][1:] == without["token_logprobs"]
    assert with_start["tokens"] == ["<bos>", *without["tokens"]]


def test_no_token_is_generated_where_none_is_wanted(plm: RemotePlm) -> None:
    ids = support.random_ids(2, [6])[0]
    one, none = answer(plm, ids)["choices"][0], answer(plm, ids, max_tokens=0)["choices"][0]
    assert {name: part[:-1] for name, part in one["logprobs"].items()} == none["logprobs"]
    assert one["text"].startswith(none["text"])
    assert len(none["logprobs"]["tokens"]) == 6


def scripted(logits_V: torch.Tensor, tokenizer: Any) -> Any:
    """A PLM that has the same logits behind every token."""
    size = len(logits_V)
    limits = SimpleNamespace(max_sequence_tokens=99, max_sequences=9, max_rows=99, max_body_bytes=2**20)
    card = SimpleNamespace(limits=limits, vocab_size=size, hidden_size=size, eos_token_ids=[EOS])

    def decode(prefixes: Any, look_ahead: Any, *, from_position: Any) -> DecodeResponse:
        rows = [len(ids) - start for ids, start in zip(prefixes, from_position, strict=True)]
        logprob, top1 = logits_V.log_softmax(-1).max(-1)
        return DecodeResponse(
            digest="d" * 64,
            echo=[0] * len(rows),
            rows_B=torch.tensor(rows),
            cr_N_D=logits_V.expand(sum(rows), -1),
            logsumexp_N=logits_V.logsumexp(-1).expand(sum(rows)),
            top1_N=top1.expand(sum(rows)),
            top1_logprob_N=logprob.expand(sum(rows)),
        )

    def head_rows(ids_C: torch.Tensor) -> LMHead:
        return LMHead(torch.eye(size)[ids_C])

    return SimpleNamespace(card=card, dtype="float32", tokenizer=tokenizer, decode=decode, head_rows=head_rows)


def test_a_final_end_of_text_has_an_entry(plm: RemotePlm) -> None:
    logits_V = torch.arange(275.0) / 300
    logits_V[EOS] = 9.0
    body = answer(scripted(logits_V, plm.tokenizer), [[5, 6], [5, EOS]])
    found, expected_V = parse_logprobs(body, [1, 1]), logits_V.log_softmax(-1)
    assert [logprob for logprob, _ in found] == pytest.approx(expected_V[[6, EOS]].tolist())
    assert [greedy for _, greedy in found] == [False, True]
    for choice in body["choices"]:
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["tokens"][-1] == "<eos>"
        assert len(choice["logprobs"]["tokens"]) == 3
    assert body["choices"][0]["text"] == "#$"


@pytest.mark.parametrize(("kind", "expected"), [(kind, ["<s>"]) for kind in KINDS if kind != "t5"] + [("t5", [])])
def test_tokenizers_say_what_they_put_before_a_text(kind: str, expected: list[str]) -> None:
    tokenizer = PlmTokenizer(bundle(KINDS[kind]()))
    assert [tokenizer.name(token) for token in tokenizer.leading_ids] == expected


@pytest.mark.parametrize("kind", ["gemma", "gpt2", "unigram"])
def test_bytes_of_one_text_do_not_collide(kind: str) -> None:
    """The most probable token is one byte and the text's another: both show as U+FFFD."""
    tokenizer = PlmTokenizer(bundle(KINDS[kind]()))
    first, second = (tokenizer.token_bytes.index(bytes([byte])) for byte in (0xC3, 0xE2))
    assert tokenizer.name(first) == tokenizer.name(second)
    logits_V = torch.zeros(len(tokenizer.token_bytes))
    logits_V[first], logits_V[second] = 5.0, 4.0
    body = answer(scripted(logits_V, tokenizer), [[10, first], [10, second]])
    assert [greedy for _, greedy in parse_logprobs(body, [1, 1])] == [True, False]
    assert body["choices"][1]["logprobs"]["top_logprobs"][1].keys() == {r"bytes:\xc3", r"bytes:\xe2"}


def test_rounding_makes_no_other_token_greedy(plm: RemotePlm) -> None:
    logits_V = torch.zeros(275)
    body = answer(scripted(logits_V, plm.tokenizer), [[5, 6], [5, int(logits_V.argmax())]])
    assert [greedy for _, greedy in parse_logprobs(body, [1, 1])] == [False, True]


def test_a_prompt_of_the_task_has_its_border(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    text, gradual = "In: the thin\nOut: die", Interpolation(lambda_max=0.8)
    ids = plm.tokenizer.encode_prompt(TASK.prompt("the thin", plm.tokenizer))[1:]
    found = answer(plm, text, adapter, gradual)["choices"][0]["logprobs"]
    named = answer(plm, text, adapter, gradual, pema={"prompt_tokens": len(ids)})["choices"][0]["logprobs"]
    alone = answer(plm, text)["choices"][0]["logprobs"]
    assert found == named
    assert found["token_logprobs"][: len(ids)] == alone["token_logprobs"][: len(ids)]
    assert found["token_logprobs"][len(ids)] != alone["token_logprobs"][len(ids)]


def test_explanations_have_each_scored_token(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    ids = support.random_ids(2, [6])[0]
    choice = answer(plm, ids, adapter, CONSTANT, pema={"explain": True})["choices"][0]
    tokens = choice["pema"]["tokens"]
    assert [each["id"] for each in tokens[:-1]] == ids
    assert [each["logprob"] for each in tokens] == pytest.approx(choice["logprobs"]["token_logprobs"])
    assert all(each["mixture_top"] for each in tokens)
    assert {each["lambda"] for each in tokens} == {0.7}


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ([5, 275], {}, "prompt"),
        ("an", {"pema": {"prompt_tokens": 9}}, "pema.prompt_tokens"),
        ("an on", {}, "pema.prompt_tokens"),
        ("half of \ud83d", {}, "prompt"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    plm: RemotePlm, adapter: TrainedAdapter, prompt: Any, fields: Any, param: str
) -> None:
    with pytest.raises(ApiError) as error:
        answer(plm, prompt, adapter, Interpolation(), **fields)
    assert error.value.status == 400
    assert error.value.param == param


def test_owners_seeing_the_texts_is_said_once(plm: RemotePlm, caplog: pytest.LogCaptureFixture) -> None:
    scorer = EchoScorer(plm)
    body = CompletionBody.model_validate({"prompt": "secret", "echo": True, "logprobs": 1, "max_tokens": 1})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scorer.answer(completion_request(body), None, PLM_ONLY)
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "fields",
    [{"echo": False}, {"logprobs": None}, {"max_tokens": 2}, {"temperature": 1.0}, {"pema": {"prefix": [5]}}],
)
def test_other_requests_are_generated(fields: dict[str, Any]) -> None:
    body = {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 1} | fields
    assert not is_scoring(completion_request(CompletionBody.model_validate(body)))
