"""The real client against the real server, token for token what the slow reference says."""

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessorList

from data_owner_client import Pair, TrainingSettings, build_memories, train, translate
from data_owner_client.adapter.gate import Gate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.network import Adapter
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.adapter.types import SCHEDULES
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.beams.search import search_beams
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import GenerationConfig, GenerationRequest, generate, sequences_of
from data_owner_client.decoding.sequence import End
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.plm.connection.base import Attempt
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import EOS, TinyModels
from plm_owner_server.admission.authentication import NoAuthentication
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.tenants.scopes import SCOPES
from plm_owner_server.tenants.store import Tenant
from tests import guard, support
from tests.basis import Basis
from tests.profiles import scaled
from tests.reference import Reference, ReplacedScores, schedule, transformers_beams
from tests.support import random_ids

TASK = Task(name="t", source_label="In", target_label="Out", examples=({"source": "an on", "target": "die"},))
WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
PAIRS = [Pair(" ".join(WORDS[i % 9 :][: 2 + i % 4]), " ".join(WORDS[(3 * i) % 7 :][: 1 + i % 3])) for i in range(24)]
STEPS = 14
BEAM_STEPS = 8
BRIEF = DecodingSettings(max_new_tokens=STEPS, length_bound=False, repetition_bound=False)
WHOLE_HEAD = pytest.mark.unguarded("draws from the whole vocabulary, for which a client needs the whole head")


class Case:
    """One architecture: servers with roomy, tiny and no caches over both transports, an adapter, and the reference."""

    def __init__(self, folder: Path, urls: list[str], memory: Path, form: Any) -> None:
        self.plms = [RemotePlm(guard.connection(url), dtype="float32", cache=None) for url in urls]
        self.plm = self.plms[0]
        build_memories(
            self.plm, TASK, PAIRS, memory, validation=PAIRS[:4], context_mode="teacher-forced", share_targets=True
        )
        # Three epochs at a high rate: PEMA must disagree with the PLM, or the test would not see a mistake.
        training = TrainingSettings(
            form=form,
            rank=16,
            epochs=3,
            batch_rows=16,
            learning_rate=0.02,
            ema_decay=0.0,
            retrieved_examples=0,
            selection_texts=0,
            minutes=0,
        )
        self.adapter: TrainedAdapter = train(self.plm, memory, memory / "adapter", settings=training)[0]
        self.memory = ExternalMemory(memory / "train").load()
        targets = self.memory.target_N.split(self.memory.rows_E.tolist())
        self.lookup = NgramDrafter(ids.tolist() for ids in targets)
        self.reference = Reference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
        self.basis = self._basis()
        self.weights = self.basis.weights(self.adapter)
        self.stops = TASK.stops(self.plm.tokenizer, [EOS])
        self.stop_ids = StopMatcher(self.plm.tokenizer, self.stops).ids

    def prompts(self, sources: list[str]) -> list[list[int]]:
        return [self.plm.tokenizer.encode_prompt(TASK.prompt(source, self.plm.tokenizer)) for source in sources]

    def _basis(self) -> Basis:
        if not self.plm.card.rotated:
            return Basis.own(self.plm.card.hidden_size)
        contexts = random_ids(3, [4] * 64)
        true_N_D = torch.stack([self.reference.context(ids)[0] for ids in contexts])
        return Basis.between(self.plm.encode(contexts, [3] * 64).cr_N_D, true_N_D)

    def expected(
        self,
        prompt: list[int],
        interpolation: Interpolation,
        expected_length: float,
        steps: int,
        adapter_prompt: list[int] | None = None,
    ) -> list[int]:
        lambdas = schedule(interpolation.schedule, interpolation.lambda_max, expected_length, steps)
        targets = self.adapter.candidate_ids_C.tolist()
        weights = self.weights
        form = self.adapter.card.form
        gate = interpolation.gate.model_dump() if interpolation.gate else None
        return self.reference.decode(
            prompt, weights, form, targets, lambdas, self.stop_ids, adapter_prompt, gate, interpolation.length_reward
        )


GATE = Gate(
    weight=(0.1, -0.5, 0.6, 0.2, -0.3, 0.4, 0.7, -0.4, 0.5, 0.9, -0.2),
    centre=(0.0, -2.0, -1.0, -3.0, -3.0, 0.3, 2.5, 1.5, 0.1, 0.2, 1.0),
    scale=(1.0, 1.5, 1.0, 2.0, 2.0, 0.5, 1.0, 0.8, 0.1, 0.4, 0.7),
)
DECODING = st.builds(
    DecodingSettings,
    max_new_tokens=st.just(STEPS),
    look_ahead=st.sampled_from([0, 1, 4, 8, None]),
    batch_size=st.sampled_from([1, 2, 7, 64]),
)
# In a secret basis the reference, which has none, must say the very same.
CASES = [
    ("llama", "residual", False),
    ("opt", "paper", True),
    ("gemma2", "residual", True),
    ("cohere", "paper", False),
    ("gpt2", "recent", True),
]


@pytest.fixture(scope="module", params=CASES, ids=[name for name, *_ in CASES])
def case(
    request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    architecture, form, rotated = request.param
    folder = tiny_models[architecture]
    access = None if guard.current else NoAuthentication(Tenant("acme", frozenset(SCOPES), Disclosure("full", rotated)))
    with ExitStack() as stack:
        urls = []
        for cache_mib in (1024, 0.003, 0):  # roomy, evicting all the time, off
            service = support.make_service(folder, prefix_cache_mib=cache_mib, max_draft_tokens=2000)
            urls += [
                stack.enter_context(open_server(service, access=access))
                for open_server in (support.serve, support.serve_over_grpc)
            ]
        case = Case(folder, urls, tmp_path_factory.mktemp("memory"), form)
        for plm in case.plms:
            stack.enter_context(plm)
        yield case


def test_teacher_forced_rows(case: Case) -> None:
    rows = iter(zip(case.basis.true(case.memory.cr_N_D), case.memory.target_N.tolist(), strict=True))
    for pair in PAIRS[:6]:
        tokens = tokenize_pair(case.plm, TASK, pair)
        for f_D, y in case.reference.teacher_forced(tokens.prompt, tokens.target):
            ours_D, ours_y = next(rows)
            assert ours_y == y
            torch.testing.assert_close(ours_D, f_D, rtol=1e-4, atol=1e-4 * f_D.abs().max().item())


def test_private_rows(case: Case, tmp_path: Path) -> None:
    build_memories(case.plm, TASK, PAIRS[:6], tmp_path, validation=PAIRS[:1])
    memory = ExternalMemory(tmp_path / "train").load()
    rows = iter(zip(case.basis.true(memory.cr_N_D), memory.target_N.tolist(), strict=True))
    for pair in PAIRS[:6]:
        tokens = tokenize_pair(case.plm, TASK, pair)
        for f_D, y in case.reference.private(tokens.prompt, tokens.target):
            ours_D, ours_y = next(rows)
            assert ours_y == y
            torch.testing.assert_close(ours_D, f_D, rtol=1e-4, atol=1e-4 * f_D.abs().max().item())


def test_aligned_private_rows_have_contexts_that_end_as_the_true_ones(case: Case, tmp_path: Path) -> None:
    build_memories(case.plm, TASK, PAIRS[:12], tmp_path, validation=PAIRS[:1])
    rows = ExternalMemory(tmp_path / "train").load().aligned()
    assert rows.matches_N is not None
    assert 0 < rows.matches_N.sum() < len(rows.matches_N)
    at = 0
    for pair in PAIRS[:12]:
        tokens = tokenize_pair(case.plm, TASK, pair)
        drafted = [case.plm.decode([tokens.prompt], [len(tokens.target) - 1]).top1_N.tolist()][0]
        contexts = case.reference.private(tokens.prompt, tokens.target)
        for i, y in enumerate(tokens.target):
            assert rows.target_N[at] == y
            near = [torch.allclose(f_D, case.basis.true(rows.cr_N_D[at]), rtol=1e-3, atol=1e-3) for f_D, _ in contexts]
            assert any(near)
            if i and rows.matches_N[at]:
                assert any(drafted[k - 1] == tokens.target[i - 1] for k, same in enumerate(near) if same and k)
            at += 1


@settings(
    max_examples=scaled(12),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.data())
def test_decoding_is_the_references_token_for_token(case: Case, data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
    sources = data.draw(st.lists(words, min_size=1, max_size=5))
    interpolation = data.draw(
        st.builds(Interpolation, schedule=st.sampled_from(SCHEDULES), lambda_max=st.sampled_from([0.3, 0.7, 0.95, 1.0]))
        | st.just(Interpolation(schedule="constant", lambda_max=0.6, gate=GATE))
    ).model_copy(update={"length_reward": data.draw(st.sampled_from([0.0, 0.7, 4.0]))})
    lengths = [case.adapter.card.expected_length(case.plm.tokenizer.count(source)) for source in sources]
    prompts = case.prompts(sources)
    # As with examples chosen for each text: the PLM sees other prompts than the adapter.
    others: list[list[int] | None] = [*case.prompts([f"reden {source}" for source in sources])]
    adapter_prompts = others if data.draw(st.booleans()) else [None] * len(sources)
    continuations, usage = generate(
        data.draw(st.sampled_from(case.plms)),
        [GenerationRequest(*each) for each in zip(prompts, lengths, adapter_prompts, strict=True)],
        GenerationConfig(
            adapter=case.adapter,
            interpolation=interpolation,
            stops=case.stops,
            settings=data.draw(DECODING),
            lookup=data.draw(st.sampled_from([None, case.lookup])),
        ),
    )
    expected = [
        case.expected(prompt, interpolation, length, STEPS, adapter_prompt)
        for prompt, length, adapter_prompt in zip(prompts, lengths, adapter_prompts, strict=True)
    ]
    assert [continuation.token_ids for continuation in continuations] == expected
    assert usage.tokens == sum(map(len, expected))


WORDS_OF_A_SOURCE = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)


def expected_beams(
    case: Case,
    prompt: list[int],
    interpolation: Interpolation,
    expected_length: float,
    adapter_prompt: list[int] | None,
    *,
    beams: int,
    length_penalty: float,
    whole: bool,
) -> list[tuple[list[int], float]]:
    """The beams of transformers' own search over the reference's mixture, with their scores.

    Args:
        whole: the beams go through all tokens, not through candidates and the PLM's top-1 alone.
    """
    lambdas = schedule(interpolation.schedule, interpolation.lambda_max, expected_length, BEAM_STEPS)
    gate = interpolation.gate.model_dump() if interpolation.gate else None
    targets, own = case.adapter.candidate_ids_C.tolist(), case.adapter.card.form

    @cache
    def logprobs(generated: tuple[int, ...]) -> Tensor:
        weight = lambdas[len(generated)]
        mixture_V, top1 = case.reference.mixture(
            *(prompt, generated, case.weights, own, targets, weight, case.stop_ids),
            *(adapter_prompt, gate, interpolation.length_reward),
        )
        compared = torch.arange(len(mixture_V)) if whole else torch.tensor([*targets, top1])
        logprob_V = torch.full_like(mixture_V, -math.inf)
        logprob_V[compared] = mixture_V[compared].log()
        return logprob_V

    found = transformers_beams(
        case.reference.model,
        prompt,
        beams=beams,
        length_penalty=length_penalty,
        max_new_tokens=BEAM_STEPS,
        stop_ids=case.stop_ids,
        logits_processor=LogitsProcessorList([ReplacedScores(len(prompt), logprobs)]),
    )
    # Where fewer tokens can follow than there are beams, transformers goes on with texts that have no probability.
    return [(ids, score) for ids, score in found if score > -1e6]


def compare_beams(case: Case, data: st.DataObject, *, whole: bool) -> None:
    """Compare some search with transformers' own."""
    sources = data.draw(st.lists(WORDS_OF_A_SOURCE, min_size=1, max_size=3))
    interpolation = data.draw(
        st.builds(Interpolation, schedule=st.sampled_from(SCHEDULES), lambda_max=st.sampled_from([0.3, 0.7, 0.95, 1.0]))
        | st.just(Interpolation(schedule="constant", lambda_max=0.6, gate=GATE))
    ).model_copy(update={"length_reward": data.draw(st.sampled_from([0.0, 0.7, 4.0]))})
    beams, length_penalty = data.draw(st.sampled_from([2, 3, 4])), data.draw(st.sampled_from([0.0, 1.0, 1.5]))
    lengths = [case.adapter.card.expected_length(case.plm.tokenizer.count(source)) for source in sources]
    prompts = case.prompts(sources)
    others: list[list[int] | None] = [*case.prompts([f"reden {source}" for source in sources])]
    adapter_prompts = others if data.draw(st.booleans()) else [None] * len(sources)
    plm = data.draw(st.sampled_from(case.plms))
    config = GenerationConfig(
        adapter=case.adapter,
        interpolation=interpolation,
        stops=case.stops,
        settings=DecodingSettings(max_new_tokens=BEAM_STEPS, batch_size=data.draw(st.sampled_from([1, 3, 5, 64]))),
        head=plm.full_head().to(torch.float32) if whole else None,
        beams=beams,
    )
    inputs = [*zip(prompts, lengths, adapter_prompts, strict=True)]
    sequences = sequences_of(plm, [GenerationRequest(*each) for each in inputs], config)
    found, usage = search_beams(plm, sequences, config.settings, beams=beams, length_penalty=length_penalty)
    for (prompt, length, adapter_prompt), continuations in zip(inputs, found, strict=True):
        expected = expected_beams(
            case,
            prompt,
            interpolation,
            length,
            adapter_prompt,
            beams=beams,
            length_penalty=length_penalty,
            whole=whole,
        )
        assert [continuation.token_ids for continuation in continuations] == [ids for ids, _ in expected]
        for continuation, (ids, score) in zip(continuations, expected, strict=True):
            # The length reward is taken from a candidate that ends the text, where λ is not 0.
            last = continuation.choices[-1]
            rewarded = last.lambda_t > 0 and ids[-1] in case.stop_ids & {*case.adapter.candidate_ids_C.tolist()}
            logprob = continuation.logprob - (interpolation.length_reward if rewarded else 0.0)
            assert logprob / len(ids) ** length_penalty == pytest.approx(score, rel=1e-3, abs=1e-3)
    assert usage.round_trips <= len(sources) * beams * BEAM_STEPS


BEAMS = settings(
    max_examples=scaled(6),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@BEAMS
@given(st.data())
def test_beams_are_those_of_transformers_over_the_mixture(case: Case, data: st.DataObject) -> None:
    compare_beams(case, data, whole=False)


@WHOLE_HEAD
@BEAMS
@given(st.data())
def test_beams_over_the_whole_vocabulary_are_those_of_transformers(case: Case, data: st.DataObject) -> None:
    compare_beams(case, data, whole=True)


def test_both_calls_of_a_round_are_the_servers_time(case: Case) -> None:
    prompts, adapter_prompts = case.prompts(["the thin", "her"]), case.prompts(["reden the thin", "reden her"])
    seen = list[Attempt]()
    with case.plm.observed_by(seen.append):
        _, usage = generate(
            case.plm,
            [GenerationRequest(*each) for each in zip(prompts, [5.0, 5.0], adapter_prompts, strict=True)],
            GenerationConfig(
                adapter=case.adapter,
                interpolation=Interpolation(schedule="constant", lambda_max=0.6),
                stops=case.stops,
                settings=BRIEF,
            ),
        )
    assert len(seen) == 2 * usage.calls
    total_ms = sum(exchange.timing.total_ms for exchange in seen if exchange.timing)
    assert usage.server_s == pytest.approx(total_ms / 1000, rel=0.05)


def test_clients_at_once_each_get_the_references_tokens(case: Case) -> None:
    """Clients with batches, look-aheads and schedules of their own share the steps of the servers they meet at."""
    sources = [" ".join(WORDS[i % 9 :][: 1 + i % 4]) for i in range(12)]
    schedules = [Interpolation(schedule=name, lambda_max=0.8) for name in SCHEDULES]
    lengths = {source: case.adapter.card.expected_length(case.plm.tokenizer.count(source)) for source in sources}
    expected = {
        (source, interpolation.schedule): case.expected(prompt, interpolation, lengths[source], STEPS)
        for source, prompt in zip(sources, case.prompts(sources), strict=True)
        for interpolation in schedules
    }

    def client(seed: int) -> None:
        chooser = random.Random(seed)
        plm = case.plms[seed % len(case.plms)]
        interpolation, own = chooser.choice(schedules), chooser.sample(sources, len(sources))
        look_ahead, batch_size = chooser.choice([0, 1, 4, 8, None]), chooser.choice([1, 7, 64])
        continuations, _ = generate(
            plm,
            [GenerationRequest(*each) for each in zip(case.prompts(own), map(lengths.get, own), strict=True)],
            GenerationConfig(
                adapter=case.adapter,
                interpolation=interpolation,
                stops=case.stops,
                settings=DecodingSettings(max_new_tokens=STEPS, look_ahead=look_ahead, batch_size=batch_size),
            ),
        )
        ours = [continuation.token_ids for continuation in continuations]
        assert ours == [expected[source, interpolation.schedule] for source in own]

    with ThreadPoolExecutor(12) as pool:
        for future in [pool.submit(client, seed) for seed in range(24)]:
            future.result(120)


@settings(
    max_examples=scaled(6), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.data())
def test_the_same_seed_draws_the_same_text_with_and_without_drafts(case: Case, data: st.DataObject) -> None:
    sampling = SamplingSettings(
        temperature=data.draw(st.sampled_from([0.7, 1.0, 1.5])),
        top_k=data.draw(st.sampled_from([0, 40])),
        top_p=data.draw(st.sampled_from([1.0, 0.9])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        seed=data.draw(st.integers(0, 5)),
        candidates_only=guard.current is not None or data.draw(st.booleans()),  # or it needs the whole head
    )
    # The last of them draws nothing: its text is that of the most probable tokens.
    prompts = case.prompts(["the thin shine", "her", "die Tür", "an"])
    gradual = Interpolation(schedule="gradual", lambda_max=0.9)

    def drawn(
        prompts: list[list[int]], settings: DecodingSettings, lookup: NgramDrafter | None = None
    ) -> list[list[int]]:
        continuations, _ = generate(
            case.plm,
            [GenerationRequest(prompt, 6.0, sample=None if prompt == last else 0) for prompt in prompts],
            GenerationConfig(
                adapter=case.adapter,
                interpolation=gradual,
                stops=case.stops,
                settings=settings,
                sampling=sampling,
                lookup=lookup,
            ),
        )
        return [continuation.token_ids for continuation in continuations]

    last = prompts[-1]
    plain = drawn(prompts, DecodingSettings(max_new_tokens=STEPS, look_ahead=0, batch_size=1))
    assert plain[-1] == case.expected(last, gradual, 6.0, STEPS)
    assert drawn(prompts, DecodingSettings(max_new_tokens=STEPS, look_ahead=4)) == plain
    assert drawn(prompts, DecodingSettings(max_new_tokens=STEPS), case.lookup) == plain
    assert drawn(prompts[::-1], DecodingSettings(max_new_tokens=STEPS, batch_size=2)) == plain[::-1]


@pytest.mark.parametrize("candidates_only", [pytest.param(False, marks=WHOLE_HEAD), True])
@pytest.mark.parametrize("narrow", [{"top_p": 0.0}, {"top_k": 1}, {"temperature": 1e-300}], ids=str)
def test_draws_from_the_most_probable_token_alone_are_the_most_probable_text(
    case: Case, narrow: dict[str, Any], candidates_only: bool
) -> None:
    prompts, gradual = case.prompts(["the thin shine", "die Tür"]), Interpolation(schedule="gradual", lambda_max=0.9)
    continuations, _ = generate(
        case.plm,
        [GenerationRequest(prompt, 6.0) for prompt in prompts],
        GenerationConfig(
            adapter=case.adapter,
            interpolation=gradual,
            stops=case.stops,
            settings=DecodingSettings(max_new_tokens=STEPS),
            sampling=SamplingSettings(**{"temperature": 1.0, "candidates_only": candidates_only} | narrow),
        ),
    )
    expected = [case.expected(prompt, gradual, 6.0, STEPS) for prompt in prompts]
    assert [continuation.token_ids for continuation in continuations] == expected


@pytest.mark.parametrize("candidates_only", [pytest.param(False, marks=WHOLE_HEAD), True])
@pytest.mark.parametrize("length_reward", [0.0, 1.5])
def test_draws_are_distributed_as_the_references_mixture(
    case: Case, length_reward: float, candidates_only: bool
) -> None:
    (prompt,), draws, weight = case.prompts(["her"]), 3000, 0.6
    continuations, _ = generate(
        case.plm,
        [GenerationRequest(prompt, 5.0, sample=sample) for sample in range(draws)],
        GenerationConfig(
            adapter=case.adapter,
            interpolation=Interpolation(schedule="constant", lambda_max=weight, length_reward=length_reward),
            stops=case.stops,
            settings=DecodingSettings(max_new_tokens=1, batch_size=256),
            sampling=SamplingSettings(temperature=1.0, seed=3, candidates_only=candidates_only),
        ),
    )
    f_D, p_plm_V = case.reference.context(prompt)
    adapter, weights = case.adapter, case.weights
    p_pema_V = case.reference.pema(f_D, weights, adapter.card.form, adapter.candidate_ids_C.tolist())
    mixture_V = p_V = (1 - weight) * p_plm_V + weight * p_pema_V
    if candidates_only:
        known_V = torch.zeros_like(p_V)
        known_V[[*adapter.candidate_ids_C.tolist(), int(p_plm_V.argmax())]] = 1.0
        p_V = p_V * known_V / (p_V * known_V).sum()
    if length_reward:
        factor_V = torch.ones_like(p_V)
        factor_V[sorted(case.stop_ids & set(adapter.candidate_ids_C.tolist()))] = math.exp(-length_reward)
        p_V = p_V * factor_V / (p_V * factor_V).sum()
    counts_V = torch.bincount(torch.tensor([c.token_ids[0] for c in continuations]), minlength=len(p_V)).double()
    # Tokens expected fewer than five times are counted together, as Pearson's test wants it.
    often_V = p_V * draws >= 5
    seen = torch.cat([counts_V[often_V], counts_V[~often_V].sum()[None]])
    expected = draws * torch.cat([p_V[often_V], p_V[~often_V].sum()[None]])
    statistic = ((seen - expected).square() / expected.clamp(min=1e-9)).sum().item()
    degrees = len(seen) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5
    for continuation in continuations[:20]:
        assert continuation.logprob == pytest.approx(float(mixture_V[continuation.token_ids[0]].log()), abs=1e-3)


def test_a_consensus_is_that_of_the_greedy_text_and_the_draws(case: Case) -> None:
    sources = ["the thin shine", "her", "die Tür"]
    drawing = SamplingSettings(temperature=1.3, seed=2, candidates_only=True)
    greedy = translate(case.plm, sources, adapter=case.adapter, decoding=BRIEF).texts
    draws = translate(case.plm, sources, adapter=case.adapter, decoding=BRIEF, sampling=drawing, samples=5, best=5).best
    agreed = translate(case.plm, sources, adapter=case.adapter, decoding=BRIEF, sampling=drawing, consensus=5, best=6)
    for source, text, drawn, ordered in zip(sources, greedy, draws, agreed.best, strict=True):
        assert sorted(ordered) == sorted([text, *drawn])
        (prompt,), length = case.prompts([source]), case.adapter.card.expected_length(case.plm.tokenizer.count(source))
        continuations, _ = generate(
            case.plm,
            [GenerationRequest(prompt, length, sample=sample) for sample in [None, *range(5)]],
            GenerationConfig(
                adapter=case.adapter,
                interpolation=case.adapter.card.interpolation,
                stops=case.stops,
                settings=BRIEF,
                sampling=drawing,
            ),
        )
        ended = sum(one.end is End.STOP for one in continuations) or 6
        whole = ordered[:ended]
        likeness = [sum(sacrebleu.sentence_chrf(one, [other]).score for other in whole) for one in ordered]
        for part in (likeness[:ended], likeness[ended:]):
            assert part == sorted(part, reverse=True)
    assert any(len(set(ordered)) > 1 for ordered in agreed.best)


def test_pema_really_changes_what_is_generated(case: Case) -> None:
    requests = [GenerationRequest(prompt, 5.0) for prompt in case.prompts([pair.source for pair in PAIRS[:8]])]
    alone, _ = generate(case.plm, requests, GenerationConfig(stops=case.stops, settings=BRIEF))
    adapted, _ = generate(
        case.plm,
        requests,
        GenerationConfig(
            adapter=case.adapter,
            interpolation=Interpolation(schedule="constant", lambda_max=0.7),
            stops=case.stops,
            settings=BRIEF,
        ),
    )
    assert sum(a != b for a, b in zip(alone, adapted, strict=True)) >= 4


def test_the_identity_adapter_is_the_plm(case: Case) -> None:
    """Residual with B_pd = 0 over the whole vocabulary: P_PEMA = P_PLM at every position."""
    card = case.adapter.card.model_copy(update={"form": "residual"})
    everything = torch.arange(case.plm.card.vocab_size)
    adapter = Adapter(case.plm.card.hidden_size, 4, "residual", rms=3.0)
    identity = TrainedAdapter(card, adapter.eval(), everything, case.plm.head_rows(everything))
    for prompt in case.prompts(["the thin shine", "her"]):
        answer = case.plm.decode([prompt], [3])
        drafted = answer.top1_N.tolist()
        for j, logprob_V in enumerate(identity.logprobs(answer.cr_N_D)):
            _, p_plm_V = case.reference.context(prompt + drafted[:j])
            torch.testing.assert_close(logprob_V.exp().double(), p_plm_V, rtol=1e-3, atol=1e-6)


def test_translate_uses_nothing_but_the_source(case: Case) -> None:
    """Gradual Unrolling's expected length comes from the source: the same text alone, in a batch, in any order."""
    sources = [pair.source for pair in PAIRS[:9]]
    gradual = Interpolation(schedule="gradual", lambda_max=0.9)
    together = translate(case.plm, sources, adapter=case.adapter, interpolation=gradual, decoding=BRIEF)
    reverse = translate(
        case.plm,
        sources[::-1],
        adapter=case.adapter,
        interpolation=gradual,
        decoding=replace(BRIEF, batch_size=2),
    )
    alone = [
        translate(case.plm, [s], adapter=case.adapter, interpolation=gradual, decoding=BRIEF).texts[0] for s in sources
    ]
    assert together.texts == alone == reverse.texts[::-1]
