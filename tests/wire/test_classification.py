"""A `classify` task from its pairs to calibrated answers: what is chosen, and what the owner of the PLM sees."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client import Pair, TrainingSettings, build_memories, train, translate
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.label_tokens import LabelTokenizer, longest_prefixes
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.grants import CHOICE_TEXTS, Demand
from data_owner_client.memory.request_batches import ExampleSizes
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.held_out_labels import fitted_temperature
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from protocol.messages import DecodeRequest, DecodeResponse
from protocol.rate_limits import RateLimitStatus
from tests.command_line import client, client_json

TASK = Task(name="t", kind="classify")
LABELS = ["a long label of many tokens", "her", "then", "thin"]
PAIRS = [Pair(f"text {i} of {LABELS[i % 4][:6]}", LABELS[i % 4]) for i in range(60)]
BRIEF = TrainingSettings(rank=8, epochs=3, batch_rows=16, learning_rate=0.02, search=False, minutes=10)


@pytest.fixture
def requests() -> list[DecodeRequest]:
    """Every decode request of the test."""
    return []


@pytest.fixture
def plm(tiny_service: PlmService, requests: list[DecodeRequest]) -> RemotePlm:
    connection = InProcessConnection(tiny_service)

    def decode(request: DecodeRequest) -> DecodeResponse:
        requests.append(request)
        return tiny_service.decode(request)

    connection.decode = decode
    return RemotePlm(connection, dtype="float32", cache=None)


def label_ids(plm: RemotePlm) -> list[tuple[int, ...]]:
    """Token ids of the labels behind a prompt."""
    return list(LabelTokenizer(plm.tokenizer, LABELS).check(TASK))


def test_labels_are_those_of_the_pairs_and_fixed_in_the_memory(plm: RemotePlm, tmp_path: Path) -> None:
    build_memories(plm, TASK, PAIRS, tmp_path)
    for part in ("train", "validation"):
        assert ExternalMemory(tmp_path / part).manifest.plan.task.labels == tuple(sorted(LABELS))
    # The same call finds its memory again; another label makes another memory, and is no label of this one.
    build_memories(plm, TASK, PAIRS, tmp_path)
    with pytest.raises(InvalidData, match=r"a label that the task does not have. *'die' is none of"):
        build_memories(plm, TASK, [*PAIRS, Pair("another", "die")], tmp_path)
    build_memories(plm, TASK, [*PAIRS, Pair("another", "die")], tmp_path, overwrite=True)
    assert "die" in ExternalMemory(tmp_path / "train").manifest.plan.task.labels


@pytest.mark.parametrize("count", [7, 2100])
def test_targets_that_are_no_labels_are_refused(plm: RemotePlm, tmp_path: Path, count: int) -> None:
    pairs = [Pair(f"text {i}", f"answer {i % (count // 2 + 1)}") for i in range(count)]
    with pytest.raises(InvalidData, match="too many to be the labels of a classify task"):
        build_memories(plm, TASK, pairs, tmp_path)


def test_a_private_memory_conceals_the_lengths_of_labels(
    plm: RemotePlm, requests: list[DecodeRequest], tmp_path: Path
) -> None:
    build_memories(plm, TASK, PAIRS, tmp_path)
    lengths = [len(ids) for ids in label_ids(plm)]
    assert len(set(lengths)) > 1
    drafted = [k for request in requests for k in request.look_ahead]
    assert drafted == [max(lengths) - 1] * len(PAIRS)
    # The rows are those of the labels all the same.
    rows = ExternalMemory(tmp_path / "train").load()
    ids = [tuple(each) for each in (row.tolist() for row in rows.target_N.split(rows.rows_E.tolist()))]
    assert set(ids) == set(label_ids(plm))
    assert len(rows.cr_N_D) == len(rows.target_N) == len(rows.context_N if rows.context_N is not None else [])


@pytest.mark.parametrize("mode", ["private", "teacher-forced"])
def test_training_chooses_by_the_probability_of_the_right_labels(
    plm: RemotePlm, requests: list[DecodeRequest], tmp_path: Path, mode: Any
) -> None:
    build_memories(plm, TASK, PAIRS, tmp_path, validation=PAIRS[:20], context_mode=mode, share_targets=True)
    requests.clear()
    adapter, report = train(plm, tmp_path, tmp_path / "adapter", settings=BRIEF)
    tried = [policy for policy in report.options if policy.label_nll is not None]
    assert {policy.interpolation.lambda_max for policy in tried} >= {i / 20 for i in range(20)}
    chosen = tried[0]
    assert report.options[0] == chosen
    assert adapter.card.interpolation == chosen.interpolation
    assert adapter.card.label_temperature == chosen.label_temperature
    assert chosen.scores is not None
    # What was chosen is what `translate` then does, with its own calls.
    adapter, exact = TrainedAdapter.load(tmp_path / "adapter"), DecodingSettings(label_tolerance=0.0)
    answers = translate(plm, [pair.source for pair in PAIRS[:20]], adapter=adapter, decoding=exact)
    assert answers.label_probabilities is not None
    right = [answers.label_probabilities[n][pair.target or ""] for n, pair in enumerate(PAIRS[:20])]
    assert -torch.tensor(right).log().mean().item() == pytest.approx(chosen.label_nll, abs=2e-3)
    accuracy = sum(text == pair.target for text, pair in zip(answers.texts, PAIRS, strict=False)) / 20
    assert 100 * accuracy == pytest.approx(chosen.scores["accuracy"])


def test_private_training_shows_the_same_labels_behind_every_text(
    plm: RemotePlm, requests: list[DecodeRequest], tmp_path: Path
) -> None:
    build_memories(plm, TASK, PAIRS, tmp_path, validation=PAIRS[:20])
    requests.clear()
    train(plm, tmp_path, tmp_path / "adapter", settings=BRIEF)
    prompts = [plm.tokenizer.encode_prompt(TASK.prompt(pair.source, plm.tokenizer)) for pair in PAIRS[:20]]
    behind = defaultdict[int, set[tuple[int, ...]]](set)
    for request in requests:
        for ids, look_ahead in zip(request.token_ids, request.look_ahead, strict=True):
            number = next(n for n, prompt in enumerate(prompts) if ids[: len(prompt)] == prompt)
            if not look_ahead:  # other calls measure the time of drafts
                behind[number].add(tuple(ids[len(prompts[number]) :]))
    assert len(behind) == len(prompts)
    assert len({frozenset(shown) for shown in behind.values()}) == 1
    assert behind[0] == set(longest_prefixes(tuple(label_ids(plm))))
    # As many tokens as `build-memory` compares with the owner's quotas.
    demand, sizes = Demand("private"), ExampleSizes()
    for prompt in prompts:
        sizes.append(len(prompt) + 9, 9)
    demand.add_choice(sizes, tuple(label_ids(plm)))
    assert demand.choice_tokens == sum(
        len(ids)
        for request in requests
        for ids, look_ahead in zip(request.token_ids, request.look_ahead, strict=True)
        if not look_ahead
    )
    assert demand.target_ids == {token for ids in label_ids(plm) for token in ids}


def test_the_grants_assume_the_texts_that_training_takes() -> None:
    assert TrainingSettings().selection_texts == CHOICE_TEXTS


def test_a_quota_is_compared_with_the_choice_of_the_mixture(
    plm: RemotePlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = list[str]()
    monkeypatch.setattr(Reporter, "say", lambda _, line: lines.append(line))
    monkeypatch.setattr(RemotePlm, "rate_limits", (RateLimitStatus("day", 1000, 1000, "tokens", 86_400, 100),))
    build_memories(plm, TASK, PAIRS, tmp_path, validation=PAIRS[:20])
    assert any("tokens; you may use 1,000 in a day" in line for line in lines)
    assert any("`train` and `translate` will show the names of the labels" in line for line in lines)


@given(st.lists(st.lists(st.integers(0, 3), max_size=5).map(lambda ids: (*ids, 9)), min_size=1, unique=True).map(tuple))
def test_the_longest_prefixes_lead_to_all_labels(label_ids: tuple[tuple[int, ...], ...]) -> None:
    prefixes = longest_prefixes(label_ids)
    assert {each[:length] for each in prefixes for length in range(len(each) + 1)} == {
        ids[:length] for ids in label_ids for length in range(len(ids))
    }
    assert not [1 for one in prefixes for other in prefixes if one != other and other[: len(one)] == one]


@given(
    seed=st.integers(0, 10_000),
    texts=st.integers(1, 30),
    labels=st.integers(1, 5),
    sharpness=st.sampled_from([0.0, 0.3, 3.0, 100.0]),
    all_right=st.booleans(),
)
def test_a_fitted_temperature_is_likelier_and_changes_no_answer(
    seed: int, texts: int, labels: int, sharpness: float, all_right: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprob_E_L = sharpness * torch.randn(texts, labels, generator=generator, dtype=torch.float64) - 30.0
    right_E = torch.randint(labels, (texts,), generator=generator)
    if all_right:
        right_E = logprob_E_L.argmax(dim=-1)
    temperature = fitted_temperature(logprob_E_L, right_E)

    def nll(t: float) -> float:
        return -(logprob_E_L / t).log_softmax(-1)[torch.arange(texts), right_E].mean().item()

    assert 0.01 < temperature < 1e3
    assert nll(temperature) <= nll(1.0) + 1e-12
    assert torch.equal((logprob_E_L / temperature).argsort(stable=True), logprob_E_L.argsort(stable=True))


def test_cards_without_a_temperature_load(plm: RemotePlm, tmp_path: Path) -> None:
    build_memories(plm, TASK, PAIRS, tmp_path, validation=PAIRS[:20])
    adapter, _ = train(plm, tmp_path, tmp_path / "adapter", settings=TrainingSettings(rank=4, epochs=1, minutes=0))
    path = tmp_path / "adapter" / "adapter.json"
    record = json.loads(path.read_text())
    del record["label_temperature"]
    path.write_text(json.dumps(record))
    assert TrainedAdapter.load(tmp_path / "adapter").card == adapter.card.model_copy(
        update={"tensors_sha256": record["tensors_sha256"]}
    )


def test_the_command_line_gives_probabilities_and_explains_labels(tiny_server: str, tmp_path: Path) -> None:
    task = tmp_path / "task.toml"
    task.write_text(f'name = "t"\nkind = "classify"\nlabels = {json.dumps(LABELS)}\n')
    why = tmp_path / "why.jsonl"
    record = client_json(tiny_server, "apply", "a text", "", "another", "--task", task, "--explain", why)
    for answer in record["texts"]:
        probabilities = answer["probabilities"]
        if not answer["source"]:
            assert (answer["text"], probabilities) == ("", {})
            continue
        assert sum(probabilities.values()) == pytest.approx(1.0)
        assert sorted(probabilities, key=lambda label: -probabilities[label]) == list(probabilities)
        assert answer["text"] == next(iter(probabilities))
    assert record["usage"]["label_prefixes"] >= 2
    explained = [json.loads(line) for line in why.read_text().splitlines()]
    assert "".join(token["token"] for token in explained[0]["tokens"]).strip() == record["texts"][0]["text"]
    done = client(tiny_server, "apply", "a text", "--task", task)
    assert done.stdout.strip() == record["texts"][0]["text"]
    assert "prefixes of labels behind their prompts" in done.stderr
    for options, name in (
        (["--consensus", 3], "--consensus"),
        (["--effort", "high"], "--effort"),
        (["--stream"], "--stream"),
    ):
        done = client(tiny_server, "apply", "a text", "--task", task, *options)
        assert done.returncode == 1
        assert f"{name} cannot be used with a classify task" in done.stderr
