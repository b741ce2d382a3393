"""lm-evaluation-harness on an adapted model: likelihoods, greedy flags and answers are those of the commands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_owner_client import DecodingSettings, Pair, TrainedAdapter, evaluate, generate, translate
from data_owner_client.evaluation.perplexity import perplexities
from data_owner_client.memory.encode import encode_all
from data_owner_client.memory.tokenized_pairs import tokenize_pair, tokenize_pairs
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import Prompt
from data_owner_client.runtime.progress import Reporter
from harness.tiny_models import BOS, MAX_POSITIONS, TinyModels
from tests.served_adapters import PAIRS, TASK
from tests.wire.gateway.harness import ANSWERS, LIKELIHOOD, LONGEST_ANSWER, ROLLING, Harness

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
SOURCES = [pair.source for pair in PAIRS[:8]]
# The flags tell what greedy decoding would do without its bounds.
UNBOUNDED = DecodingSettings(length_bound=False, repetition_bound=False, max_new_tokens=40)


@pytest.fixture
def harness(clients_python: Path, offline: Mapping[str, str], tmp_path: Path) -> Harness:
    return Harness(clients_python, offline, tmp_path)


def scored_pairs(plm: RemotePlm, adapter: TrainedAdapter) -> list[Pair]:
    """Sources with their targets, and again with what decoding answers."""
    answers = translate(plm, SOURCES, adapter=adapter, decoding=UNBOUNDED).texts
    decoded = [Pair(source, answer) for source, answer in zip(SOURCES, answers, strict=True) if answer]
    return [*PAIRS[:8], *decoded]


@pytest.mark.parametrize(
    ("adapter_name", "batch_size", "tokenized_requests", "num_concurrent"),
    [
        ("constant", 1, True, 1),
        ("constant", 8, False, 1),
        ("gradual", 8, True, 1),
        ("gradual", 1, False, 4),
        ("rewarded", 8, True, 2),
    ],
)
def test_scores_and_answers_are_those_of_the_commands(
    plm: RemotePlm,
    url: str,
    harness: Harness,
    adapter: TrainedAdapter,
    adapter_name: str,
    batch_size: int,
    tokenized_requests: bool,
    num_concurrent: int,
) -> None:
    pairs = scored_pairs(plm, adapter)
    prompts = [TASK.prompt(pair.source, plm.tokenizer).text for pair in pairs]
    texts = [
        {"prompt": prompt, "target": f" {pair.target}\n", "text": f"{prompt} {pair.target}"}
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    harness.write_tasks(texts)
    answers = harness.run(
        "local-completions",
        [LIKELIHOOD, ANSWERS],
        *("--batch_size", str(batch_size)),
        model=adapter_name,
        base_url=f"{url}/v1/completions",
        tokenizer_backend="remote",
        tokenized_requests=tokenized_requests,
        num_concurrent=num_concurrent,
        max_length=MAX_POSITIONS,
        max_retries=1,
    )
    found = [(float(logprob), str(is_greedy) == "True") for logprob, is_greedy in answers[LIKELIHOOD]]
    assert [logprob for logprob, _ in found] == pytest.approx(
        [log_likelihood(plm, adapter, pair) for pair in pairs], abs=1e-4
    )
    total = evaluate(plm, pairs, adapter, share_targets=True).perplexity
    assert total is not None
    assert sum(logprob for logprob, _ in found) == pytest.approx(-math.log(total.mixture) * total.tokens, abs=1e-4)
    flags = [is_greedy for _, is_greedy in found]
    assert flags == [is_decoded(plm, adapter, pair) for pair in pairs]
    assert set(flags) == {True, False}
    decoding = DecodingSettings(max_new_tokens=LONGEST_ANSWER)
    assert answers[ANSWERS] == generate(plm, prompts, adapter=adapter, stop=["\n"], decoding=decoding).texts


def log_likelihood(plm: RemotePlm, adapter: TrainedAdapter, pair: Pair) -> float:
    """log P of a target under the mixture, as `evaluate` computes it."""
    rows = encode_all(plm, tokenize_pairs(plm, [TASK], [pair], label="pair"), Reporter())
    found = perplexities(plm, adapter, rows, adapter.card.interpolation)
    return -math.log(found.mixture) * found.tokens


def is_decoded(plm: RemotePlm, adapter: TrainedAdapter, pair: Pair) -> bool:
    """True if greedy decoding chooses each token of the target."""
    target = tokenize_pair(plm, TASK, pair).target
    (ids,) = translate(plm, [pair.source], adapter=adapter, decoding=UNBOUNDED).token_ids
    return ids[: len(target)] == target


def test_rolling_likelihoods_of_the_plm_are_those_of_transformers(
    plm: RemotePlm, url: str, harness: Harness, tiny_models: TinyModels
) -> None:
    texts = [f"{pair.source} {pair.target}" for pair in PAIRS[:4]]
    harness.write_tasks([{"prompt": "", "target": "", "text": text} for text in texts])
    found = harness.run(
        "local-completions",
        [ROLLING],
        model=plm.card.name,
        base_url=f"{url}/v1/completions",
        max_length=MAX_POSITIONS,
        max_retries=1,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float64).eval()
    expected = list[float]()
    for text in texts:
        ids = plm.tokenizer.encode_prompt(Prompt(text))
        assert ids[0] == BOS
        with torch.inference_mode():
            logprob_N_V = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(float(logprob_N_V[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum()))
    assert [float(logprob) for logprob in found[ROLLING]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("adapter_name", ["gradual"])
def test_chats_are_answered_as_by_translate(
    plm: RemotePlm, url: str, harness: Harness, adapter: TrainedAdapter, adapter_name: str
) -> None:
    harness.write_tasks([{"prompt": source, "target": "", "text": ""} for source in SOURCES])
    answers = harness.run(
        "local-chat-completions",
        [ANSWERS],
        "--apply_chat_template",
        model=adapter_name,
        base_url=f"{url}/v1/chat/completions",
        max_retries=1,
    )
    decoding = DecodingSettings(max_new_tokens=LONGEST_ANSWER)
    assert answers[ANSWERS] == translate(plm, SOURCES, adapter=adapter, decoding=decoding).texts
