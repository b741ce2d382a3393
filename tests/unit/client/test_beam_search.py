"""Beam search against transformers' own, and its ends where transformers has no such rules."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from data_owner_client import generate, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.cli import generation as cli
from data_owner_client.cli.options import DecodingOptions
from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.repetition import RepetitionDetector
from data_owner_client.data.stops import StopMatcher, Stops
from data_owner_client.data.tasks import Task
from data_owner_client.decoding import decode_loop
from data_owner_client.decoding.beams.extensions import Extension
from data_owner_client.decoding.beams.hypotheses import TextBeams
from data_owner_client.decoding.beams.search import search_beams
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import Continuation, GenerationConfig, GenerationRequest, sequences_of
from data_owner_client.decoding.sequence import End, EndRules, SequenceState
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.plm.tokenizer import PlmTokenizer, Prompt
from harness.tiny_models import EOS, VOCAB_SIZE, TinyModels, tiny_tokenizer
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData, NumericalFault, Unsupported
from protocol.messages import TokenizerBundle
from tests import support
from tests.adapters import random_adapter
from tests.profiles import scaled
from tests.reference import transformers_beams, until_stop

STEPS = 12
BRIEF = DecodingSettings(max_new_tokens=STEPS)
PROMPTS = support.random_ids(5, [3, 9, 1, 6, 4])
STOPS = {
    "eos": frozenset({EOS}),
    # Every fourth token ends a text, so that beams end early.
    "many": frozenset(range(2, VOCAB_SIZE, 4)),
}


@pytest.fixture
def plm(tiny_service: PlmService) -> RemotePlm:
    return RemotePlm(InProcessConnection(tiny_service), dtype="float32", cache=None)


@pytest.fixture
def adapter(plm: RemotePlm) -> TrainedAdapter:
    return random_adapter(plm, task=Task(name="t"))


def search(
    plm: RemotePlm,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    length_penalty: float = 1.0,
    **request: Any,
) -> tuple[list[list[Continuation]], GenerationStats]:
    sequences = sequences_of(plm, [GenerationRequest(ids, 6.0, **request) for ids in prompts], config)
    return search_beams(plm, sequences, config.settings, beams=config.beams, length_penalty=length_penalty)


@pytest.fixture(scope="module", params=support.ARCHITECTURES_IN_CI)
def model(request: pytest.FixtureRequest, tiny_models: TinyModels) -> tuple[RemotePlm, Any]:
    """A tiny model behind our engine, and by transformers alone."""
    folder = tiny_models[request.param]
    plm = RemotePlm(InProcessConnection(support.make_service(folder)), dtype="float32", cache=None)
    return plm, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize(("beams", "length_penalty"), [(2, 1.0), (3, 2.0), (4, 0.0), (4, 1.0)])
def test_all_beams_are_those_of_transformers(
    model: tuple[RemotePlm, Any], beams: int, length_penalty: float, stops: str
) -> None:
    """The PLM alone, over the whole vocabulary: all texts, in their order and with their scores."""
    plm, own = model
    stop_ids = STOPS[stops]
    config = GenerationConfig(stops=Stops(ids=stop_ids), settings=BRIEF, beams=beams)
    found, _ = search(plm, config, length_penalty=length_penalty)
    lengths = set[int]()
    for prompt, continuations in zip(PROMPTS, found, strict=True):
        expected = transformers_beams(
            own, prompt, beams=beams, length_penalty=length_penalty, max_new_tokens=STEPS, stop_ids=stop_ids
        )
        assert [each.token_ids for each in continuations] == [ids for ids, _ in expected]
        scores = [each.logprob / len(each.token_ids) ** length_penalty for each in continuations]
        expected_scores = torch.tensor([score for _, score in expected])
        torch.testing.assert_close(torch.tensor(scores), expected_scores, rtol=1e-4, atol=1e-4)
        lengths |= {len(each.token_ids) for each in continuations}
    # A high length penalty prefers texts of full length.
    assert stops == "eos" or length_penalty > 0 or min(lengths) < STEPS, "no text has ended early"


@pytest.mark.parametrize("stops", STOPS)
def test_one_beam_is_greedy_decoding(model: tuple[RemotePlm, Any], stops: str) -> None:
    plm, own = model
    config = GenerationConfig(stops=Stops(ids=STOPS[stops]), settings=BRIEF, beams=2)
    sequences = sequences_of(plm, [GenerationRequest(ids) for ids in PROMPTS], config)
    found, _ = search_beams(plm, sequences, BRIEF, beams=1, length_penalty=1.0)
    greedy, _ = decode_loop.generate(plm, [GenerationRequest(ids) for ids in PROMPTS], config)
    assert [[each.token_ids for each in row] for row in found] == [[each.token_ids] for each in greedy]
    for prompt, (continuation,) in zip(PROMPTS, found, strict=True):
        ids = own.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=STEPS, eos_token_id=sorted(STOPS[stops])
        )
        assert continuation.token_ids == until_stop(ids[0, len(prompt) :].tolist(), STOPS[stops])


TOKENIZER = PlmTokenizer(
    TokenizerBundle(
        tokenizer_json=tiny_tokenizer().backend_tokenizer.to_str(),
        chat_template=None,
        special_tokens={"eos_token": "<eos>"},
    )
)
A, B, C = TOKENIZER.encode_prompt(Prompt("abc", with_special_tokens=False))
TOKENS = (A, B, C, EOS)
ENDS = st.fixed_dictionaries(
    {
        "texts": st.sampled_from([(), ("ab",), ("abc", "ca")]),
        "repetition_limit": st.sampled_from([None, 2, 3]),
        "full_length": st.sampled_from([End.MAX_TOKENS, End.LENGTH_BOUND]),
    }
)


LogprobsOf = Callable[[tuple[int, ...]], list[float]]


@dataclass(frozen=True, order=True)
class Leaf:
    """A text that has ended; the best ones are the smallest."""

    is_cut: bool
    minus_score: float
    kept: tuple[int, ...]
    end: End


def scripted(seed: int) -> LogprobsOf:
    """Log-probabilities of four tokens that look random, as a function of the text."""

    @cache
    def logprobs(ids: tuple[int, ...]) -> list[float]:
        generator = torch.Generator().manual_seed(hash((seed, *ids)) % 2**63)
        values: list[float] = (2 * torch.randn(4, generator=generator, dtype=torch.float64)).log_softmax(-1).tolist()
        return values

    return logprobs


def all_leaves(logprobs: LogprobsOf, length: int, ends: dict[str, Any], length_penalty: float) -> list[Leaf]:
    """Every text over four tokens, the best first, by plain recursion."""
    found = list[Leaf]()

    def visit(ids: tuple[int, ...], logprob: float) -> None:
        for token, token_logprob in zip(TOKENS, logprobs(ids), strict=True):
            grown, total = (*ids, token), logprob + token_logprob
            text = "".join("abc"[TOKENS.index(i)] for i in grown if i != EOS)
            detector = RepetitionDetector()
            repeated = [detector.append(i) for i in grown][-1]
            kept, end = grown, None
            if token == EOS or any(stop in text for stop in ends["texts"]):
                end = End.STOP
            elif ends["repetition_limit"] is not None and repeated >= ends["repetition_limit"]:
                kept, end = grown[:-repeated], End.REPETITION
            elif len(grown) == length:
                end = ends["full_length"]
            if end is None:
                visit(grown, total)
            else:
                is_cut = end in (End.REPETITION, End.LENGTH_BOUND)
                found.append(Leaf(is_cut, -total / len(grown) ** length_penalty, kept, end))

    visit((), 0.0)
    return sorted(found)


def beams_to_the_end(
    logprobs: LogprobsOf, length: int, ends: dict[str, Any], length_penalty: float, beams: int
) -> list[Leaf]:
    """The hypotheses of one text."""
    rules = EndRules(StopMatcher(TOKENIZER, Stops(ends["texts"], frozenset({EOS}))), ends["repetition_limit"])
    selector: Any = None
    sequence = SequenceState(selector, [A], [0.0] * length, length, rules, ends["full_length"])
    text, longer = TextBeams(sequence, beams, length_penalty), list[int]()
    while text.live:
        assert len(text.live) <= beams
        longer.append(text.live[0].sequence.length)
        text.extend(
            [
                [
                    Extension(TokenChoice(token, 0.0, logprob, None, token, None), logprob)
                    for token, logprob in zip(TOKENS, logprobs(tuple(beam.sequence.generated)), strict=True)
                ]
                for beam in text.live
            ]
        )
    assert longer == list(range(len(longer)))
    assert sequence.length == 0, "forks leave the text as it was"
    return [
        Leaf(each.rank[0], -each.score, tuple(each.sequence.generated), each.sequence.end or End.STOP)
        for each in text.hypotheses
    ]


def kept_and_end(leaf: Leaf) -> tuple[bool, tuple[int, ...], End]:
    return leaf.is_cut, leaf.kept, leaf.end


@settings(max_examples=scaled(60))
@given(seed=st.integers(0, 1000), length=st.integers(1, 4), ends=ENDS, length_penalty=st.sampled_from([0.0, 1.0, 1.7]))
def test_enough_beams_find_all_texts_in_their_order(
    seed: int, length: int, ends: dict[str, Any], length_penalty: float
) -> None:
    """Stops, repetitions and both bounds, by exhaustion; so the best text is at least as good as the greedy one."""
    expected = all_leaves(scripted(seed), length, ends, length_penalty)
    found = beams_to_the_end(scripted(seed), length, ends, length_penalty, beams=200)
    assert [*map(kept_and_end, found)] == [*map(kept_and_end, expected)]
    assert [leaf.minus_score for leaf in found] == pytest.approx([leaf.minus_score for leaf in expected])


@settings(max_examples=scaled(60))
@given(seed=st.integers(0, 1000), ends=ENDS, length_penalty=st.sampled_from([0.0, 1.0, 1.7]), beams=st.integers(1, 5))
def test_few_beams_find_some_texts_in_their_order(
    seed: int, ends: dict[str, Any], length_penalty: float, beams: int
) -> None:
    """Texts that ended by themselves are before those that were cut, and scores are those of the texts."""
    leaves = all_leaves(scripted(seed), 5, ends, length_penalty)
    found = beams_to_the_end(scripted(seed), 5, ends, length_penalty, beams)
    assert 1 <= len(found) <= beams
    assert [leaf.is_cut for leaf in found] == sorted(leaf.is_cut for leaf in found)
    for leaf, better in zip(found, [None, *found], strict=False):
        assert better is None or better.is_cut < leaf.is_cut or better.minus_score <= leaf.minus_score
        assert any(
            kept_and_end(leaf) == kept_and_end(each) and leaf.minus_score == pytest.approx(each.minus_score)
            for each in leaves
        )


def test_a_text_without_a_probable_token_is_a_fault() -> None:
    with pytest.raises(NumericalFault, match="No token has a probability"):
        TextBeams(sequences_without_plm(), 2, 1.0).extend([[]])


def sequences_without_plm() -> SequenceState:
    selector: Any = None
    return SequenceState(selector, [A], [0.0], 1, EndRules(StopMatcher(TOKENIZER, Stops())))


def recorded(plm: RemotePlm, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Sequences, token ids and bytes of rows of each call, as the calls are made."""
    calls, decode = list[tuple[int, int, int]](), plm.decode

    def record(prefixes: Sequence[Sequence[int]], look_ahead: Sequence[int], *rest: Any, **options: Any) -> Any:
        assert not any(look_ahead)
        response = decode(prefixes, look_ahead, *rest, **options)
        rows = [response.cr_N_D, response.last_hidden_N_D, response.logsumexp_N]
        rows += [response.top1_N, response.top1_logprob_N]
        received = sum(each.nbytes for each in rows if each is not None)
        calls.append((len(prefixes), sum(map(len, prefixes)), received))
        return response

    monkeypatch.setattr(plm, "decode", record)
    return calls


def config_of(adapter: TrainedAdapter, **options: Any) -> GenerationConfig:
    interpolation = Interpolation(schedule="linear", lambda_max=0.8)
    return GenerationConfig(adapter=adapter, interpolation=interpolation, **{"settings": BRIEF, "beams": 4, **options})


def test_all_beams_of_all_texts_are_in_one_call(
    plm: RemotePlm, adapter: TrainedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(plm, monkeypatch)
    found, stats = search(plm, config_of(adapter))
    assert [sequences for sequences, *_ in calls] == [len(PROMPTS)] + [4 * len(PROMPTS)] * (STEPS - 1)
    assert (stats.calls, stats.round_trips, stats.tokens) == (STEPS, sum(row[0] for row in calls), stats.round_trips)
    assert stats.bytes_sent == 4 * sum(ids for _, ids, _ in calls)
    assert stats.bytes_received == pytest.approx(sum(received for *_, received in calls), abs=STEPS * 20)
    assert all(len(row) == 4 and len({tuple(each.token_ids) for each in row}) == 4 for row in found)


@pytest.mark.parametrize("batch_size", [1, 3, 9, 64])
def test_the_batch_size_bounds_calls_and_changes_no_text(
    plm: RemotePlm, adapter: TrainedAdapter, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    expected, _ = search(plm, config_of(adapter))
    calls = recorded(plm, monkeypatch)
    found, _ = search(plm, config_of(adapter, settings=DecodingSettings(max_new_tokens=STEPS, batch_size=batch_size)))
    assert [[each.token_ids for each in row] for row in found] == [[each.token_ids for each in row] for row in expected]
    assert max(sequences for sequences, *_ in calls) <= batch_size


def test_candidates_that_are_all_tokens_are_the_whole_vocabulary(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    """The two ways to the same mixture; and alternatives are recorded on both."""
    ids_V = torch.arange(VOCAB_SIZE)
    every = TrainedAdapter(adapter.card, adapter.adapter, ids_V, plm.head_rows(ids_V))
    stops = Stops(ids=STOPS["many"])
    interpolation = Interpolation(schedule="constant", lambda_max=0.4, length_reward=1.0)
    rows, whole = (
        search(plm, replace(config_of(every, stops=stops, head=head), interpolation=interpolation), alternatives=3)[0]
        for head in (None, plm.full_head().to(torch.float32))
    )
    for ours, theirs in zip(itertools.chain(*rows), itertools.chain(*whole), strict=True):
        assert ours.token_ids == theirs.token_ids
        for one, other in zip(ours.choices, theirs.choices, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.share == pytest.approx(other.share, abs=1e-4)
            assert (one.plm_token, one.pema_token) == (other.plm_token, other.pema_token)
            assert one.alternatives is not None
            assert other.alternatives is not None
            assert [token for token, _ in one.alternatives.plm] == [token for token, _ in other.alternatives.plm]


def test_texts_of_the_library(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    prompts = ["the thin", "", "die Tür"]
    for model in (None, adapter):
        four = generate(plm, prompts, adapter=model, beams=4, best=3, length_penalty=0.5, decoding=BRIEF)
        assert [len(texts) for texts in four.best] == [3, 1, 3]
        assert four.texts[1] == ""
        assert generate(plm, prompts, adapter=model, beams=4, length_penalty=0.5, decoding=BRIEF).texts == four.texts
        for prompt, choices, texts in zip(prompts, four.choices, four.best, strict=True):
            assert plm.tokenizer.decode_continuation([choice.token for choice in choices]) == texts[0], prompt
        greedy = generate(plm, prompts, adapter=model, decoding=BRIEF)
        assert generate(plm, prompts, adapter=model, beams=1, decoding=BRIEF).texts == greedy.texts
        begun = generate(plm, ["the"], adapter=model, beams=3, prefix=[A, B], decoding=BRIEF)
        assert begun.token_ids[0][:2] == [A, B]


def test_effort_stands_for_a_search(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    options: Any = {"adapter": adapter, "task": Task(name="t"), "decoding": BRIEF}
    searches: dict[Any, Any] = {"low": {}, "medium": {"beams": 4}, "high": {"consensus": 8}}
    for effort, search_options in searches.items():
        by_effort = translate(plm, ["the thin", "her"], effort=effort, **options)
        by_name = translate(plm, ["the thin", "her"], **search_options, **options)
        assert by_effort.token_ids == by_name.token_ids
        assert by_effort.stats.round_trips == by_name.stats.round_trips
    best = translate(plm, ["the"], effort="high", best=9, adapter=adapter, task=Task(name="t"), decoding=BRIEF)
    assert len(best.best[0]) == 9


def test_candidates_need_no_whole_head(plm: RemotePlm, adapter: TrainedAdapter) -> None:
    plm.card = plm.card.model_copy(update={"head_policy": "candidate"})
    assert generate(plm, ["the"], adapter=adapter, beams=2, decoding=BRIEF).texts
    with pytest.raises(Unsupported, match="does not give you the whole LM head"):
        generate(plm, ["the"], beams=2, decoding=BRIEF)


HELD = Task(name="t", kind="extract", answer_schema={"type": "object", "properties": {"a": {"type": "integer"}}})
LABELS = Task(name="t", kind="classify", labels=("on", "an"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2, "length_penalty": math.nan}, "length_penalty is nan"),
        ({"beams": 2, "length_penalty": -1.0}, "length_penalty is -1"),
        ({"length_penalty": 2.0}, "there are none. Give --beams, such as 4, or --effort medium"),
        ({"effort": "high", "length_penalty": 2.0}, "there are none"),
        ({"beams": 2, "best": 3}, "3 best of 2"),
        ({"beams": 2, "consensus": 2}, "two ways to search"),
        ({"beams": 2, "samples": 2, "sampling": SamplingSettings(temperature=1.0)}, "draws none"),
        ({"beams": 2, "sampling": SamplingSettings(repetition_penalty=1.2)}, "draws none"),
        ({"beams": 2, "on_token": lambda *_: None}, "Leave --stream away"),
        ({"beams": 2, "on_text": lambda *_: None}, "Leave --stream away"),
        ({"beams": 2, "lookup": NgramDrafter([[1, 2, 3]])}, "--lookup finds drafts"),
        ({"beams": 2, "form": AnswerForm(choices=("on",))}, "held to a form"),
        ({"beams": 2, "task": HELD}, "Say --effort high or --consensus, decode with --no-hold"),
        ({"effort": "medium", "task": HELD}, "held to a form"),
        ({"beams": 2, "task": LABELS}, "--beams cannot be used with a classify task"),
        ({"effort": "high", "task": LABELS}, "--effort cannot be used with a classify task"),
        ({"effort": "huge"}, "It must be one of low, medium, high"),
        ({"effort": "low", "consensus": 2}, "--effort and --consensus both say"),
        ({"effort": "medium", "beams": 2}, "--effort and --beams both say"),
        ({"effort": "high", "samples": 2, "sampling": SamplingSettings(temperature=1.0)}, "--effort and --samples"),
    ],
)
def test_contradictions_are_refused_before_a_call(
    plm: RemotePlm, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    monkeypatch.setattr(plm, "decode", lambda *_, **__: pytest.fail("the server was called"))
    with pytest.raises(InvalidData, match=re.escape(message)):
        translate(plm, ["the"], **{"task": Task(name="t"), **options})


def test_a_file_begun_by_another_search_is_not_continued() -> None:
    def changing(**options: Any) -> list[object]:
        return cli._Options(more=DecodingOptions(**options)).changing(None)

    plain = changing()
    assert plain == changing(beams=1) == changing(effort="low")
    others = [changing(beams=4), changing(beams=4, length_penalty=2.0), changing(beams=3), changing(consensus=8)]
    assert all(one not in [plain, *others[:at]] for at, one in enumerate(others))
    assert changing(effort="medium") == others[0]
    assert changing(effort="high") == others[3]
