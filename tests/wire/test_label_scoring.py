"""Labels of a `classify` task: their probabilities against full softmaxes in float64, over every transport."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.adapter.types import SCHEDULES, AdapterForm
from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Shot, Task
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import PLM_ONLY
from data_owner_client.decoding.generation import translate
from data_owner_client.decoding.labels.requests import LabelRequest
from data_owner_client.decoding.labels.scoring import score_labels
from data_owner_client.decoding.options import GenerationOptions
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import TELLING, TinyModels
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from tests import guard, support
from tests.adapters import adapter_card
from tests.basis import Basis
from tests.profiles import scaled
from tests.reference import Reference, schedule
from tests.support import random_ids
from tests.wire.test_against_reference import GATE

LABELS = ("the", "then", "thin", "die Tür", "die", "an", "andere", "her", "x")
TASK = Task(name="t", kind="classify", labels=LABELS, source_label="In", target_label="Out")
SOURCES = ("an on", "the thin shine", "reden", "die Tür her")
ANY = TASK.model_copy(update={"labels": ()})
# The adapter knows the tokens of these alone, so that it has no row for some labels' tokens.
LEARNED = LABELS[:6]
EXACT = DecodingSettings(label_tolerance=0.0)


def random_adapter(plm: RemotePlm, form: AdapterForm) -> TrainedAdapter:
    """An adapter with large random weights, so that it disagrees with the PLM."""
    ids = [i for label in LEARNED for i in tokenize_pair(plm, TASK, Pair("a", label)).target]
    ids_C = torch.tensor(sorted(set(ids)))
    head, D = plm.head_rows(ids_C), plm.card.hidden_size
    torch.manual_seed(2)
    network = Adapter(D, 8, form, rms=2.0)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    card = adapter_card(
        ModelIdentity.from_card(plm.card),
        head,
        task=TASK,
        form=form,
        rank=8,
        length_ratio=0.8,
        interpolation=Interpolation(schedule="constant", lambda_max=0.5),
    )
    return TrainedAdapter(card, network.eval(), ids_C, head)


class CachedReference(Reference):
    """The reference, which computes each context once."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._cached = cache(super().context)

    def context(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cached(tuple(token_ids))


class Case:
    """A tiny model behind three connections, an adapter, and the reference."""

    def __init__(self, folder: Any, stack: ExitStack, form: AdapterForm) -> None:
        service = support.make_service(folder)
        connections = [guard.connection(stack.enter_context(each(service))) for each in SERVERS]
        if guard.current is None:
            connections.append(InProcessConnection(service))
        self.plms = [stack.enter_context(RemotePlm(each, dtype="float32", cache=None)) for each in connections]
        self.plm = self.plms[0]
        self.adapter = random_adapter(self.plm, form)
        reference = CachedReference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
        self.reference = reference
        basis = Basis.own(self.plm.card.hidden_size)
        if self.plm.card.rotated:
            contexts = random_ids(3, [4] * 64)
            true_N_D = torch.stack([reference.context(ids)[0] for ids in contexts])
            basis = Basis.between(self.plm.encode(contexts, [3] * 64).cr_N_D, true_N_D)
        self.weights = basis.weights(self.adapter)

    def request(self, source: str, labels: tuple[str, ...], *, shot: bool = False) -> LabelRequest:
        """A text; with `shot` the PLM sees an example, and the adapter does not."""
        tokens = [tokenize_pair(self.plm, ANY, Pair(source, label)) for label in labels]
        prompt = tokens[0].prompt
        task = ANY.model_copy(update={"examples": (Shot(source="on", target="an"),)})
        plm_prompt = tokenize_pair(self.plm, task, Pair(source, "x")).prompt if shot else prompt
        expected_length = self.adapter.card.expected_length(tokens[0].source_tokens)
        label_ids = tuple(tuple(each.target) for each in tokens)
        return LabelRequest(plm_prompt, label_ids, expected_length, prompt if shot else None)

    def truth(self, request: LabelRequest, interpolation: Interpolation) -> torch.Tensor:
        """log P of each label, float64 [L]."""
        longest = max(map(len, request.label_ids))
        lambdas = schedule(interpolation.schedule, interpolation.lambda_max, request.expected_length or 1.0, longest)
        return torch.tensor(
            self.reference.label_logprobs(
                request.prompt,
                request.label_ids,
                self.weights,
                self.adapter.card.form,
                self.adapter.candidate_ids_C.tolist(),
                lambdas,
                request.adapter_prompt,
                interpolation.gate.model_dump() if interpolation.gate else None,
            ),
            dtype=torch.float64,
        )


SERVERS = (support.serve, support.serve_over_grpc)
CASES = [("llama", "residual"), ("gemma2", "paper"), ("opt", "recent"), ("phi", "residual")]


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=case[0], marks=() if case[0] in TELLING else pytest.mark.slow) for case in CASES],
)
def case(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Iterator[Case]:
    architecture, form = request.param
    with ExitStack() as stack:
        yield Case(tiny_models[architecture], stack, form)


INTERPOLATIONS = st.one_of(
    st.builds(Interpolation, schedule=st.sampled_from(SCHEDULES), lambda_max=st.sampled_from([0.0, 0.3, 0.9])),
    st.just(Interpolation(schedule="constant", lambda_max=0.5, gate=GATE)),
)


@settings(max_examples=scaled(24), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    labels=st.lists(st.sampled_from(LABELS), min_size=1, max_size=len(LABELS), unique=True).map(tuple),
    sources=st.lists(st.tuples(st.sampled_from(SOURCES), st.booleans()), min_size=1, max_size=3, unique=True),
    interpolation=INTERPOLATIONS,
    tolerance=st.sampled_from([0.0, 1e-4, 0.1]),
    temperature=st.sampled_from([1.0, 2.0]),
    batch_size=st.sampled_from([1, 2, 32]),
    connection=st.integers(0, 2),
)
def test_labels_have_the_probabilities_of_the_full_softmax(
    case: Case,
    labels: tuple[str, ...],
    sources: list[tuple[str, bool]],
    interpolation: Interpolation,
    tolerance: float,
    temperature: float,
    batch_size: int,
    connection: int,
) -> None:
    plm = case.plms[connection % len(case.plms)]
    requests = [case.request(source, labels, shot=shot) for source, shot in sources]
    decoding = DecodingSettings(label_tolerance=tolerance, batch_size=batch_size)
    scored, stats = score_labels(
        plm,
        requests,
        labels,
        adapter=case.adapter,
        interpolations=[interpolation],
        temperature=temperature,
        settings=decoding,
    )
    assert sorted(number for group in scored for number in group.numbers) == list(range(len(requests)))
    assert stats.label_prefixes >= len(requests)
    for group in scored:
        logprob_B_L = group.evidence.label_logprobs(interpolation)
        probability_B_L = (logprob_B_L / temperature).softmax(-1)
        torch.testing.assert_close(probability_B_L.sum(-1), torch.ones(len(logprob_B_L), dtype=torch.float64))
        for number, logprob_L, probability_L in zip(group.numbers, logprob_B_L, probability_B_L, strict=True):
            truth_L = case.truth(requests[number], interpolation)
            if tolerance == 0:
                torch.testing.assert_close(logprob_L, truth_L, rtol=1e-4, atol=1e-3)
            expected_L = (truth_L / temperature).softmax(-1)
            assert float((probability_L - expected_L).abs().max()) <= tolerance + 1e-3
            best, second = [*truth_L.sort(descending=True).values.tolist(), float("-inf")][:2]
            if best - second > 1e-2:
                assert probability_L.argmax() == truth_L.argmax()


def test_the_plm_alone_needs_only_the_rows_of_the_labels(case: Case) -> None:
    requests = [case.request(source, LABELS) for source in SOURCES]
    scored, _ = score_labels(case.plm, requests, LABELS, settings=EXACT)
    for group in scored:
        for number, logprob_L in zip(group.numbers, group.evidence.label_logprobs(PLM_ONLY), strict=True):
            truth_L = case.truth(requests[number], PLM_ONLY)
            torch.testing.assert_close(logprob_L, truth_L, rtol=1e-4, atol=1e-3)


def test_a_tolerance_sends_fewer_prefixes(case: Case) -> None:
    labels = tuple(f"{first} {second} {third}" for first in LABELS for second in LABELS for third in LABELS[:2])
    requests = [case.request(source, labels) for source in SOURCES]
    usage = {
        tolerance: score_labels(
            case.plm, requests, labels, settings=replace(EXACT, label_tolerance=tolerance, batch_size=2)
        )[1]
        for tolerance in (0.0, 1e-4, 0.2)
    }
    assert usage[0.0].label_tokens > usage[1e-4].label_tokens > usage[0.2].label_tokens
    assert usage[0.0].label_prefixes > usage[1e-4].label_prefixes


def test_labels_longer_than_an_answer_of_the_server(tiny_models: TinyModels) -> None:
    service = support.make_service(tiny_models["llama"], max_answer_bytes=4 * 32 * 3)  # three rows
    plm = RemotePlm(InProcessConnection(service), dtype="float32", cache=None)
    assert plm.card.limits.max_rows == 3
    labels = ("andere Tür her", "andere Tür die")
    ids = tuple(tuple(tokenize_pair(plm, ANY, Pair("a", label)).target) for label in labels)
    assert min(map(len, ids)) > 6
    prompt = tokenize_pair(plm, ANY, Pair("a", "x")).prompt
    scored, _ = score_labels(plm, [LabelRequest(prompt, ids)], labels, settings=EXACT)
    reference = Reference(AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float64).eval())
    truth = reference.label_logprobs(prompt, ids, {}, "residual", [], [0.0] * 20)
    torch.testing.assert_close(
        scored[0].evidence.label_logprobs(PLM_ONLY)[0],
        torch.tensor(truth, dtype=torch.float64),
        rtol=1e-4,
        atol=1e-3,
    )


def test_texts_are_answered_with_their_most_probable_labels(case: Case) -> None:
    sources = [*SOURCES, " "]
    interpolation = case.adapter.card.interpolation
    calibrated = replace(case.adapter, card=case.adapter.card.model_copy(update={"label_temperature": 2.0}))
    result = translate(case.plm, sources, adapter=calibrated)
    assert result.label_probabilities is not None
    for number, source in enumerate(SOURCES):
        request = case.request(source, LABELS)
        truth_L = case.truth(request, interpolation)
        order = truth_L.argsort(descending=True).tolist()
        assert result.texts[number] == LABELS[order[0]]
        expected = dict(zip(LABELS, (truth_L / 2.0).softmax(-1).tolist(), strict=True))
        assert result.label_probabilities[number] == pytest.approx(expected, abs=2e-3)
        assert result.best[number] == list(result.label_probabilities[number])
        # The scores of the tokens, with which `apply --explain` explains the answer.
        assert result.token_ids[number] == list(request.label_ids[order[0]])
        logprob = sum(choice.logprob for choice in result.choices[number])
        assert logprob == pytest.approx(truth_L.max().item(), abs=2e-3)
    assert (result.texts[-1], result.choices[-1], result.label_probabilities[-1]) == ("", [], {})


def test_the_explained_tokens_are_those_of_decoding(case: Case) -> None:
    """Each token of the label has the favourites that decoding shows where it has written the same."""
    adapter, task = case.adapter, TASK.model_copy(update={"kind": "rewrite", "labels": ()})
    for source in SOURCES:
        scored = translate(case.plm, [source], adapter=adapter).choices[0]
        decoded = translate(case.plm, [source], adapter=adapter, task=task).choices[0]
        for ours, theirs in zip(scored, decoded, strict=False):
            assert (ours.plm_token, ours.pema_token) == (theirs.plm_token, theirs.pema_token)
            if ours.token != theirs.token:
                break
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"consensus": 4}, "--consensus"),
        ({"sampling": SamplingSettings(temperature=0.5), "samples": 3}, "--samples and --temperature"),
        ({"on_text": lambda *_: None}, "--stream"),
        ({"stop": "x"}, "--stop"),
        ({"lookup": NgramDrafter([[1, 2, 3]])}, "--lookup"),
        ({"decoding": DecodingSettings(hold=False)}, "--no-hold"),
    ],
)
def test_options_of_decoded_texts_are_refused(tiny_service: PlmService, options: GenerationOptions, name: str) -> None:
    plm = RemotePlm(InProcessConnection(tiny_service), cache=None)
    with pytest.raises(InvalidData, match=f"{name} cannot be used with a classify task"):
        translate(plm, ["a text"], task=TASK, **options)


def test_a_task_without_labels_is_refused(tiny_service: PlmService) -> None:
    plm = RemotePlm(InProcessConnection(tiny_service), cache=None)
    with pytest.raises(InvalidData, match="The task names no labels"):
        translate(plm, ["a text"], task=ANY)


def test_only_a_text_that_is_too_long_fails(tiny_service: PlmService) -> None:
    plm = RemotePlm(InProcessConnection(tiny_service), cache=None)
    room = plm.card.limits.max_sequence_tokens
    failed = dict[int, InvalidData]()
    result = translate(plm, ["an " * room, "an on"], task=TASK, on_failure=failed.__setitem__)
    assert list(failed) == [0]
    assert "the longest label" in str(failed[0])
    assert result.texts[0] == ""
    assert result.texts[1] in LABELS
