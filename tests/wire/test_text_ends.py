"""Ends of texts on a served model: stops that span tokens, bounds, and what is shown of a text while it grows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_owner_client import (
    Pair,
    TrainedAdapter,
    TrainingSettings,
    build_memories,
    generate,
    train,
    translate,
)
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data import stops
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.generation import ngram_drafter_for
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import EOS, TinyModels
from protocol.errors import InvalidData
from tests import guard

PROMPTS = ["the thin", "def f(x):", "Shopping list:", "die Tür "]
TASK = Task(name="t", source_label="In", target_label="Out", stop="###")
WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
PAIRS = [Pair(" ".join(WORDS[i % 9 :][: 2 + i % 4]), " ".join(WORDS[(3 * i) % 7 :][: 1 + i % 3])) for i in range(24)]
HALF = Interpolation(schedule="constant", lambda_max=0.5)
DEFAULTS: dict[str, Any] = {}
UNBOUNDED: dict[str, Any] = {"length_bound": False, "repetition_bound": False}
DRAFTS: list[dict[str, Any]] = [{"look_ahead": 0}, {"look_ahead": 1}, {"look_ahead": 4, "batch_size": 2}, {}]


@pytest.fixture(scope="module")
def plm(tiny_server: str) -> Iterator[RemotePlm]:
    with guard.remote_plm(tiny_server) as remote:
        yield remote


@pytest.fixture(scope="module")
def memory(plm: RemotePlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    build_memories(plm, TASK, PAIRS, folder, validation=PAIRS[:4], context_mode="teacher-forced", share_targets=True)
    return folder


@pytest.fixture(scope="module")
def adapter(plm: RemotePlm, memory: Path) -> TrainedAdapter:
    settings = TrainingSettings(
        rank=16, epochs=3, batch_rows=16, learning_rate=0.02, retrieved_examples=0, selection_texts=0, minutes=0
    )
    return train(plm, memory, memory / "adapter", settings=settings)[0]


class Shown:
    """The beginnings of each text that were shown, one after another."""

    def __init__(self, texts: int) -> None:
        self.parts: list[list[str]] = [[] for _ in range(texts)]

    def add(self, number: int, text: str) -> None:
        self.parts[number].append(text)


def test_a_bare_prompt_is_continued_as_transformers_does(plm: RemotePlm, tiny_models: TinyModels) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    texts = generate(plm, PROMPTS, decoding=DecodingSettings(max_new_tokens=40)).texts
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_stop_that_spans_tokens_ends_a_text(
    plm: RemotePlm, adapter: TrainedAdapter, memory: Path, drafts: dict[str, Any], adapted: bool
) -> None:
    options: Any = {"adapter": adapter, "interpolation": HALF} if adapted else {}
    decoding = DecodingSettings(max_new_tokens=40, **UNBOUNDED, **drafts)
    whole = generate(plm, PROMPTS, decoding=DecodingSettings(max_new_tokens=40, **UNBOUNDED), **options)
    ends = [text[9:12] for text in whole.texts]
    expected = [text[: min(text.index(end) for end in ends if end in text)] for text in whole.texts]
    lookup = ngram_drafter_for(memory) if adapted else None
    stopped = generate(plm, PROMPTS, stop=ends, decoding=decoding, lookup=lookup, **options)
    assert stopped.texts == expected
    assert stopped.stats.tokens < whole.stats.tokens
    for ids, all_ids in zip(stopped.token_ids, whole.token_ids, strict=True):
        assert ids == all_ids[: len(ids)]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_stop_that_too_many_tokens_contain_is_found_by_the_client_alone(
    plm: RemotePlm, adapter: TrainedAdapter, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"adapter": adapter, "interpolation": HALF} if adapted else {}
    known = generate(plm, PROMPTS, stop=["e"], **options)
    monkeypatch.setattr(stops, "_MAX_DRAFTING_STOPS", 1)
    unknown = generate(plm, PROMPTS, stop=["e"], **options)
    assert unknown.token_ids == known.token_ids
    assert unknown.texts == known.texts


@pytest.mark.parametrize("sampling", [None, SamplingSettings(temperature=1.5, seed=3, candidates_only=True)])
def test_a_text_is_the_same_whatever_is_drafted_and_what_is_shown_is_final(
    plm: RemotePlm, adapter: TrainedAdapter, memory: Path, sampling: SamplingSettings | None
) -> None:
    sources = [pair.source for pair in PAIRS[:8]]
    texts = set[tuple[str, ...]]()
    for lookup in (None, ngram_drafter_for(memory)):
        for drafts in DRAFTS:
            shown = Shown(len(sources))
            result = translate(
                plm,
                sources,
                adapter=adapter,
                interpolation=HALF,
                decoding=DecodingSettings(max_new_tokens=60, **drafts),
                sampling=sampling,
                lookup=lookup,
                on_text=shown.add,
            )
            texts.add(tuple(result.texts))
            for parts, text in zip(shown.parts, result.texts, strict=True):
                assert all(later.startswith(earlier) for earlier, later in zip(parts, [*parts[1:], text], strict=True))
    assert len(texts) == 1


def test_answers_are_bounded_by_the_lengths_of_the_memory(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    sources = [pair.source for pair in PAIRS]
    bounds = adapter.card.bounds
    assert bounds is not None
    free, bounded = (
        translate(
            plm, sources, adapter=adapter, interpolation=HALF, decoding=DecodingSettings(max_new_tokens=100, **options)
        )
        for options in (UNBOUNDED, {"repetition_bound": False})
    )
    limits = [bounds.max_tokens(plm.tokenizer.count(source)) for source in sources]
    assert bounded.token_ids == [ids[:limit] for ids, limit in zip(free.token_ids, limits, strict=True)]
    longer = sum(len(ids) > limit for ids, limit in zip(free.token_ids, limits, strict=True))
    assert bounded.stats.length_bound_ends >= longer > 0


@pytest.mark.parametrize("interpolation", [None, Interpolation(schedule="none")])
def test_the_plm_alone_has_no_bounds(
    plm: RemotePlm, adapter: TrainedAdapter, interpolation: Interpolation | None
) -> None:
    options: Any = {"adapter": adapter, "interpolation": interpolation} if interpolation else {"task": TASK}
    sources = [pair.source for pair in PAIRS[:8]]
    free, alone = (
        translate(plm, sources, decoding=DecodingSettings(max_new_tokens=80, **flags), **options)
        for flags in (UNBOUNDED, DEFAULTS)
    )
    assert alone.token_ids == free.token_ids


def test_an_adapter_without_bounds_on_its_card_has_none(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    """Cards of earlier versions do not have them."""
    old = TrainedAdapter(
        adapter.card.model_copy(update={"bounds": None}), adapter.adapter, adapter.candidate_ids_C, adapter.head
    )
    sources = [pair.source for pair in PAIRS[:8]]
    free, same = (
        translate(plm, sources, adapter=each, interpolation=HALF, decoding=DecodingSettings(max_new_tokens=80, **flags))
        for each, flags in ((adapter, UNBOUNDED), (old, {}))
    )
    assert same.token_ids == free.token_ids


def test_a_memory_with_a_stop_of_several_tokens_ends_its_targets_with_all_of_it(plm: RemotePlm, memory: Path) -> None:
    rows = ExternalMemory(memory / "train").load()
    stops = StopMatcher(plm.tokenizer, TASK.stops(plm.tokenizer, [EOS]))
    assert stops.ids == {EOS}
    for ids_T, pair in zip(rows.target_N.split(rows.rows_E.tolist()), PAIRS, strict=True):
        assert plm.tokenizer.decode(ids_T.tolist()).strip() == f"{pair.target}###"
        assert stops.end(ids_T.tolist()) == len(ids_T) - 1


def test_a_length_reward_has_no_effect_on_a_stop_that_no_token_contains(
    plm: RemotePlm, adapter: TrainedAdapter
) -> None:
    """No single token decides the end, so there is none whose probability the reward could lower."""
    plain, rewarded = (
        translate(plm, PROMPTS, adapter=adapter, interpolation=HALF.with_length_reward(reward)).token_ids
        for reward in (0.0, 10.0)
    )
    assert plain == rewarded


@pytest.mark.parametrize("target", ["a###b", "###", "a#", "##"])
def test_a_target_with_a_stop_or_the_beginning_of_one_at_its_end_is_refused(plm: RemotePlm, target: str) -> None:
    with pytest.raises(InvalidData, match="contains the stop '###' or ends with a part of it"):
        tokenize_pair(plm, TASK, Pair("the thin", target))


def test_the_text_of_the_eos_token_in_a_target_is_no_end(plm: RemotePlm) -> None:
    pair = tokenize_pair(plm, TASK, Pair("the thin", "die <eos> Tür"))
    stops = StopMatcher(plm.tokenizer, TASK.stops(plm.tokenizer, plm.card.eos_token_ids))
    assert stops.end(pair.target) == len(pair.target) - 1
    assert stops.text(pair.target) == " die <eos> Tür"


def test_private_contexts_end_where_the_continuation_has_the_stop(plm: RemotePlm, tmp_path: Path) -> None:
    """The PLM's own continuation is cut at its stop, which is found in its text."""
    continuation = generate(plm, [f"In: {PAIRS[0].source}\nOut:"], decoding=DecodingSettings(max_new_tokens=12))
    task = TASK.model_copy(update={"stop": continuation.texts[0][3:5]})
    stops = StopMatcher(plm.tokenizer, task.stops(plm.tokenizer, []))
    stop = stops.end(continuation.token_ids[0])
    assert stop is not None
    pairs = [Pair(PAIRS[0].source, "on an on an on an")]
    build_memories(plm, task, pairs, tmp_path, validation=pairs)
    rows = ExternalMemory(tmp_path / "train").load()
    assert rows.context_N is not None
    assert rows.context_N.max() == min(stop, len(rows.target_N) - 1)
