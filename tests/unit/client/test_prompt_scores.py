"""Scores of given tokens against the whole softmax in float64, the decode loop, and the perplexities of `evaluate`."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from data_owner_client.adapter.gate import Gate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.adapter.types import ADAPTER_FORMS, SCHEDULES, AdapterForm
from data_owner_client.data.pairs import Pair
from data_owner_client.data.stops import Stops
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.answer_border import text_to_score
from data_owner_client.decoding.decode_loop import GenerationConfig, GenerationRequest, generate
from data_owner_client.decoding.prompt_scores import PromptScorer, ScoredPosition, TextToScore
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.evaluation.perplexity import perplexities
from data_owner_client.memory.encode import encode_all
from data_owner_client.memory.tokenized_pairs import tokenize_pairs
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.token_logprobs import HeadRowCache
from data_owner_client.runtime.progress import Reporter
from harness.tiny_models import VOCAB_SIZE, TinyModels
from protocol.errors import InvalidData, OverLimit
from protocol.marked_text import MarkedText
from tests import support
from tests.adapters import adapter_card
from tests.profiles import scaled
from tests.reference import Reference, gated, schedule

TASK = Task(name="t", source_label="In", target_label="Out", examples=({"source": "an on", "target": "die"},))
CHAT = Task(name="t", format="chat", instruction="Say it otherwise.")
WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
PAIRS = [Pair(" ".join(WORDS[i:][: 1 + i % 4]), " ".join(WORDS[3 * i % 7 :][: 1 + i % 3])) for i in range(9)]
GATE = Gate(
    weight=(0.1, -0.5, 0.6, 0.2, -0.3, 0.4, 0.7, -0.4, 0.5, 0.9, -0.2),
    centre=(0.0, -2.0, -1.0, -3.0, -3.0, 0.3, 2.5, 1.5, 0.1, 0.2, 1.0),
    scale=(1.0, 1.5, 1.0, 2.0, 2.0, 0.5, 1.0, 0.8, 0.1, 0.4, 0.7),
)
GATED = Interpolation(schedule="constant", lambda_max=0.5, gate=GATE)
INTERPOLATIONS = st.one_of(
    st.just(GATED),
    st.builds(
        Interpolation,
        schedule=st.sampled_from(SCHEDULES),
        lambda_max=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        length_reward=st.sampled_from([0.0, 3.0]),
    ),
)


@dataclass
class Case:
    """A tiny model as a client sees it, and as the reference does."""

    plm: RemotePlm
    reference: Reference

    def adapter(self, form: AdapterForm, seed: int, candidates: Iterable[int] | None = None, **card: Any) -> Any:
        """An adapter with random weights."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(VOCAB_SIZE, generator=generator)[: 40 + seed % 100]
        ids_C = drawn.sort().values if candidates is None else torch.tensor(sorted(candidates))
        size, head = self.plm.card.hidden_size, self.plm.head_rows(ids_C)
        network = Adapter(size, 4, form)
        for weight in network.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
        fields = {"task": TASK, "rank": 4, "form": form, **card}
        return TrainedAdapter(
            adapter_card(ModelIdentity.from_card(self.plm.card), head, **fields), network.eval(), ids_C, head
        )

    @cached_property
    def head_rows(self) -> HeadRowCache:
        return HeadRowCache(self.plm)

    def scorer(self, adapter: Any, interpolation: Interpolation, **options: Any) -> PromptScorer:
        return PromptScorer(self.plm, self.head_rows, adapter=adapter, interpolation=interpolation, **options)

    @torch.inference_mode()
    def expected(
        self, text: TextToScore, adapter: TrainedAdapter | None, interpolation: Interpolation
    ) -> tuple[torch.Tensor, list[float]]:
        """The mixture [N, V] at positions 1 to n of a text, float64, and λ at each."""
        out = self.reference.model(input_ids=torch.tensor([list(text.token_ids)]), output_hidden_states=True)
        mixture_N_V, lambdas = out.logits[0].softmax(-1), list[float]()
        steps = schedule(interpolation.schedule, interpolation.lambda_max, text.expected_length, len(mixture_N_V) + 1)
        for row, f_D in enumerate(out.hidden_states[-1][0]):
            t = row + 1 - text.border
            lambdas.append(0.0)
            if adapter is None or t < 0 or interpolation.finished(0, 1.0):
                continue
            weights = {name: value.double() for name, value in adapter.adapter.state_dict().items()}
            targets = adapter.candidate_ids_C.tolist()
            behind = text.token_ids[text.border : row + 1]
            p_pema_V = self.reference.pema(f_D, weights, adapter.card.form, targets, behind)
            lambdas[-1] = steps[t]
            if interpolation.gate is not None:
                gate = interpolation.gate.model_dump()
                lambdas[-1] = gated(gate, mixture_N_V[row], p_pema_V, targets, t)
            mixture_N_V[row] = (1 - lambdas[-1]) * mixture_N_V[row] + lambdas[-1] * p_pema_V
        return mixture_N_V, lambdas


# Phi has a head with a bias. A soft-cap would make many tokens of a random model equal.
@pytest.fixture(scope="module", params=["llama", "phi"])
def case(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Case:
    folder = tiny_models[request.param]
    plm = RemotePlm(InProcessConnection(support.make_service(folder)), dtype="float32", cache=None)
    return Case(plm, Reference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()))


def texts_of(seed: int, count: int) -> list[TextToScore]:
    """Random texts with random borders."""
    chosen = random.Random(seed)
    lengths = [chosen.randint(1, 20) for _ in range(count)]
    return [
        TextToScore(ids, chosen.randint(0, len(ids)), chosen.choice([1.0, 4.5, 30.0]))
        for ids in support.random_ids(seed, lengths)
    ]


@settings(max_examples=scaled(80))
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.sampled_from([*ADAPTER_FORMS, None]),
    INTERPOLATIONS,
    st.integers(0, 8),
)
def test_every_position_is_that_of_the_whole_softmax(
    case: Case, seed: int, count: int, form: AdapterForm | None, interpolation: Interpolation, alternatives: int
) -> None:
    texts, adapter = texts_of(seed, count), None if form is None else case.adapter(form, seed)
    stops = frozenset(range(3, 60))
    scored = case.scorer(adapter, interpolation, alternatives=alternatives, stop_ids=stops).score(texts)
    for text, positions in zip(texts, scored, strict=True):
        mixture_N_V, lambdas = case.expected(text, adapter, interpolation)
        assert len(positions) == len(text.token_ids)
        for row, position in enumerate(positions):
            logprob_V, ranked_V = mixture_N_V[row].log(), mixture_N_V[row].log()
            assert position.choice.lambda_t == pytest.approx(lambdas[row], abs=1e-4)
            if adapter is not None and lambdas[row] > 0:
                penalised = sorted(stops & {*adapter.candidate_ids_C.tolist()})
                ranked_V[penalised] -= interpolation.length_reward
            assert ranked_V[position.choice.token] >= ranked_V.max() - 1e-4
            assert position.choice.logprob == pytest.approx(float(logprob_V[position.choice.token]), abs=1e-4)
            assert_top_is_certain(position, ranked_V, alternatives)
            if position.own is None:
                assert row == len(positions) - 1
                continue
            assert position.own.token == text.token_ids[row + 1]
            assert position.logprob == pytest.approx(float(logprob_V[position.own.token]), abs=1e-4)
            assert position.is_greedy == (position.own.token == position.choice.token)
            assert position.is_greedy == (position.logprob == position.choice.logprob)
            assert position.is_greedy == (position.ranked_logprob == position.choice.logprob)
            assert position.ranked_logprob <= position.choice.logprob


def assert_top_is_certain(position: ScoredPosition, ranked_V: torch.Tensor, count: int) -> None:
    """The listed tokens are the most probable ones of the vocabulary, apart from rounding."""
    top = position.most_probable(count)
    assert len(top) <= count
    if count:
        assert top[0] == (position.choice.token, position.choice.logprob)
        assert len({token for token, _ in top}) == len(top)
    for number, (token, logprob) in enumerate(top[1:], 1):
        assert logprob <= position.choice.logprob
        assert ranked_V[token] >= ranked_V.sort(descending=True).values[number] - 1e-4


@settings(max_examples=scaled(40))
@given(st.integers(0, 2**31), st.sampled_from(ADAPTER_FORMS), INTERPOLATIONS)
def test_greedy_tokens_are_those_of_the_decode_loop(
    case: Case, seed: int, form: AdapterForm, interpolation: Interpolation
) -> None:
    (text,), adapter = texts_of(seed, 1), case.adapter(form, seed)
    text = replace(text, border=max(1, text.border))
    # Stops that the text does not have, or its prefixes would be whole answers.
    stops = frozenset(range(3, 100)) - {*text.token_ids}
    config = GenerationConfig(
        adapter=adapter,
        interpolation=interpolation,
        stops=Stops(ids=stops),
        settings=DecodingSettings(max_new_tokens=len(text.token_ids) + 2, batch_size=4),
    )
    ids, border = list(text.token_ids), text.border
    ends = range(border, len(ids) + 1)
    requests = [GenerationRequest(ids[:border], text.expected_length, prefix=ids[border:end]) for end in ends]
    continuations, _ = generate(case.plm, requests, config)
    (positions,) = case.scorer(adapter, interpolation, stop_ids=stops).score([text])
    for end, continuation in zip(ends, continuations, strict=True):
        decoded, position = continuation.choices[end - border], positions[end - 1]
        assert position.choice.token == decoded.token
        assert position.choice.logprob == pytest.approx(decoded.logprob, abs=1e-5)
    # A decoded text is greedy from its border to its end.
    whole = TextToScore([*ids[:border], *continuations[0].token_ids], border, text.expected_length)
    (positions,) = case.scorer(adapter, interpolation, stop_ids=stops).score([whole])
    assert all(position.is_greedy for position in positions[border - 1 : -1])


def test_a_stop_that_decoding_passes_over_is_not_greedy(case: Case) -> None:
    ids = support.random_ids(1, [8])[0]
    adapter = case.adapter("residual", 1, candidates=range(3, VOCAB_SIZE))
    constant = Interpolation(schedule="constant", lambda_max=0.9)
    (plain,) = case.scorer(adapter, constant).score([TextToScore(ids)])
    best = plain[-1].choice
    rewarded = constant.with_length_reward(20.0)
    scorer = case.scorer(adapter, rewarded, stop_ids=frozenset({best.token}), alternatives=3)
    (scored,) = scorer.score([TextToScore([*ids, best.token])])
    position = scored[-2]
    assert not position.is_greedy
    assert position.logprob == pytest.approx(best.logprob)
    assert position.logprob > position.choice.logprob
    assert position.ranked_logprob == pytest.approx(best.logprob - 20)


@pytest.mark.parametrize(
    "interpolation",
    [GATED, *(Interpolation(schedule=name, lambda_max=0.8) for name in SCHEDULES if name != "none")],
    ids=str,
)
@pytest.mark.parametrize("task", [TASK, CHAT], ids=lambda task: task.format)
def test_log_probabilities_are_those_of_evaluate(tiny_models: TinyModels, task: Task, interpolation: Any) -> None:
    plm = RemotePlm(InProcessConnection(support.make_service(tiny_models["llama"])), cache=None)
    case = Case(plm, SimpleNamespace())  # type: ignore[arg-type]
    # The chat template ends in a space, which the tokenizer would merge with other beginnings.
    usable = [pair for pair in PAIRS if task is TASK or not (pair.target or "").startswith(("d", "t"))]
    pairs = tokenize_pairs(plm, [task] * len(usable), usable, label="pair")
    candidates = {token for pair in pairs[:3] for token in pair.target}
    adapter = case.adapter("recent", 4, candidates, task=task, length_ratio=0.7, mean_length=9.0)
    expected = perplexities(plm, adapter, encode_all(plm, pairs, Reporter()), interpolation)
    texts = [text_to_score(plm.tokenizer, pair.prompt + pair.target, adapter, interpolation) for pair in pairs]
    assert [text.border for text in texts] == [len(pair.prompt) for pair in pairs]
    logprobs = [
        position.logprob
        for pair, positions in zip(pairs, case.scorer(adapter, interpolation).score(texts), strict=True)
        for position in positions[len(pair.prompt) - 1 : -1]
    ]
    assert len(logprobs) == expected.tokens
    assert math.exp(-sum(logprobs) / len(logprobs)) == pytest.approx(expected.mixture, rel=1e-4)


def test_a_border_is_asked_for_where_it_matters(case: Case) -> None:
    tokenizer, adapter = case.plm.tokenizer, case.adapter("residual", 1)
    ids = support.random_ids(1, [9])[0]
    constant = Interpolation(schedule="constant", lambda_max=0.5)
    assert text_to_score(tokenizer, ids, None, constant).border == 0
    assert text_to_score(tokenizer, ids, adapter, constant).border == 0
    assert text_to_score(tokenizer, ids, adapter, Interpolation(), 4).border == 4
    assert text_to_score(tokenizer, ids, adapter, Interpolation(), 4).expected_length == adapter.card.mean_length
    for other, interpolation in (
        (adapter, Interpolation()),
        (adapter, GATED),
        (case.adapter("recent", 1), constant),
    ):
        with pytest.raises(InvalidData, match=r"pema\.prompt_tokens"):
            text_to_score(tokenizer, ids, other, interpolation)
    with pytest.raises(InvalidData, match="10 tokens"):
        text_to_score(tokenizer, ids, adapter, constant, 10)


def test_the_last_prompt_of_a_text_counts(case: Case) -> None:
    tokenizer, adapter = case.plm.tokenizer, case.adapter("residual", 1, length_ratio=2.0)
    prompt = tokenizer.encode_prompt(TASK.prompt("the thin", tokenizer))
    answer = tokenizer.encode_target(TASK.prompt("the thin", tokenizer), prompt, MarkedText(" Tür: reden"))
    text = text_to_score(tokenizer, [*prompt, *answer], adapter, Interpolation())
    assert text.border == len(prompt)
    assert text.expected_length == 2 * tokenizer.count("the thin")


def test_each_row_of_the_head_is_requested_once(case: Case) -> None:
    requested = list[int]()

    def head_rows(ids_C: torch.Tensor) -> Any:
        requested.extend(ids_C.tolist())
        return case.plm.head_rows(ids_C)

    counted: Any = SimpleNamespace(card=case.plm.card, head_rows=head_rows)
    cache, texts = HeadRowCache(counted), [TextToScore(ids) for ids in support.random_ids(3, [30, 30])]
    for _ in range(3):
        PromptScorer(case.plm, cache).score(texts)
    assert len(requested) == len({*requested})
    assert {*requested} <= {token for text in texts for token in text.token_ids}
    small = HeadRowCache(counted, max_bytes=4 * case.plm.card.hidden_size * 2)
    for ids in ([5, 6, 7], [7, 5], [5]):
        head = small.rows(ids)
        assert torch.equal(head.weight_V_D, case.plm.head_rows(torch.tensor(ids)).weight_V_D)


def test_calls_stay_within_the_limits(case: Case) -> None:
    calls = list[list[int]]()
    limits = case.plm.card.limits.model_copy(update={"max_rows": 7, "max_sequences": 3})

    def decode(prefixes: Any, look_ahead: Any, *, from_position: Any) -> Any:
        assert len(prefixes) <= 3
        assert not any(look_ahead)
        calls.append([len(ids) - start for ids, start in zip(prefixes, from_position, strict=True)])
        return case.plm.decode(prefixes, look_ahead, from_position=from_position)

    card = case.plm.card.model_copy(update={"limits": limits})
    limited: Any = SimpleNamespace(card=card, dtype="float32", decode=decode)
    texts = [TextToScore(ids) for ids in support.random_ids(5, [20, 3, 1, 8])]
    found = PromptScorer(limited, case.head_rows).score(texts)
    assert max(map(sum, calls)) <= 7
    assert sum(map(sum, calls)) == 32
    whole = PromptScorer(case.plm, case.head_rows).score(texts)
    for ours, theirs in zip(found, whole, strict=True):
        assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], abs=1e-4)
    with pytest.raises(OverLimit, match="200 tokens"):
        PromptScorer(case.plm, case.head_rows).score([TextToScore([5] * 200)])
