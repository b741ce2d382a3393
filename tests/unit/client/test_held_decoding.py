"""Held decoding against a float64 reference over the whole vocabulary, position by position.

The PLM's and the adapter's logits are functions of the context. The PLM's LM head is the identity, so that any logits
can be its hidden states.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.answer_form import AnswerForm
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.structured_answers import json_line
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import Continuation, GenerationConfig, GenerationRequest, generate
from data_owner_client.decoding.held.grammar import AnswerGrammar
from data_owner_client.decoding.sequence import End
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.plm.tokenizer import PlmTokenizer
from protocol.errors import Forbidden, Unsupported
from protocol.head import LMHead
from protocol.messages import DecodeResponse
from protocol.types import HeadPolicy
from tests.held_answers import SCHEMAS, TOKENIZERS, SchemaAndAnswer, eos_of, spell, stops_of
from tests.profiles import scaled

STEPS = 40
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "device": {"enum": ["lamp", "é"]},
        "name": {"type": "string", "maxLength": 4},
        "n": {"type": "integer"},
    },
    "required": ["device"],
    "additionalProperties": False,
}
KINDS = ["gpt2", "gemma", "unigram"]
LogitsOf = Callable[[Sequence[int]], Tensor]


class Logits:
    """Logits that look random, as a function of the context; more for some tokens that end answers.

    Args:
        tokenizer: the tokenizer.
        seed: another function for each seed.
        wanted: token ids that the logits want one after another behind a prompt of one token; empty for none.
    """

    def __init__(self, tokenizer: PlmTokenizer, seed: int, wanted: Sequence[int] = ()) -> None:
        self._cached = lru_cache(maxsize=None)(self._behind)
        self._seed = seed
        self._wanted = wanted
        self._bonus_V = torch.zeros(len(tokenizer.token_bytes))
        self._bonus_V[[n for n, text in enumerate(tokenizer.token_bytes) if text and text[:1] in b'\n"}{,1']] = 3.0

    def __call__(self, context: Sequence[int]) -> Tensor:
        """Logits [V] behind the context, float32."""
        return self._cached(tuple(context))

    def _behind(self, context: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self._seed, *context)) % 2**63)
        logits_V = 2.0 * torch.randn(len(self._bonus_V), generator=generator) + self._bonus_V
        at = len(context) - 1
        if at < len(self._wanted):
            logits_V[self._wanted[at]] += 30.0
        return logits_V


class Plm:
    """A PLM in this process, with what an owner may grant."""

    def __init__(self, tokenizer: PlmTokenizer, plm: LogitsOf, adapter: LogitsOf, policy: str, *, scope: bool) -> None:
        self.tokenizer = tokenizer
        self.calls = 0
        self._plm, self._adapter, self._scope = plm, adapter, scope
        self._size = len(tokenizer.token_bytes)
        limits = {"max_sequence_tokens": 1000, "max_sequences": 100, "max_rows": 10_000, "max_look_ahead": 64}
        self.card = SimpleNamespace(limits=SimpleNamespace(**limits), head_policy=policy, vocab_size=self._size)

    @contextmanager
    def observed_by(self, observer: Any) -> Iterator[None]:
        yield

    def decode(
        self, prefixes: Any, look_ahead: Sequence[int], stop_ids: Sequence[int] = (), *, from_position: Sequence[int]
    ) -> DecodeResponse:
        rows, counts = list[Tensor](), list[int]()
        for prefix, drafts, start in zip(prefixes, look_ahead, from_position, strict=True):
            ids, first = list(prefix), len(rows)
            for _ in range(drafts):
                ids.append(int(self._plm(ids).argmax()))
                if ids[-1] in stop_ids:
                    break
            rows += [
                torch.cat([self._plm(ids[:end]), self._adapter(ids[:end])]) for end in range(start + 1, len(ids) + 1)
            ]
            counts.append(len(rows) - first)
        cr_N_D = torch.stack(rows)
        plm_N_V = cr_N_D[:, : self._size]
        logprob_N, top1_N = plm_N_V.log_softmax(-1).max(-1)
        return DecodeResponse(
            digest="d" * 64,
            echo=[0] * len(prefixes),
            rows_B=torch.tensor(counts),
            cr_N_D=cr_N_D,
            logsumexp_N=plm_N_V.logsumexp(-1),
            top1_N=top1_N,
            top1_logprob_N=logprob_N,
        )

    def grants(self, scope: str) -> bool:
        return self._scope

    def most_probable(self, context: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        top = self._plm(context).log_softmax(-1).topk(count)
        return top.indices, top.values

    def head_rows(self, token_ids_C: Tensor) -> LMHead:
        self.calls += 1
        if self.card.head_policy == "none":
            raise Forbidden("no rows")
        return self._whole().rows(token_ids_C)

    few_head_rows = head_rows

    def full_head(self, reporter: object = None) -> LMHead:
        if self.card.head_policy != "full":
            raise Forbidden("no head")
        return self._whole()

    def _whole(self) -> LMHead:
        return LMHead(torch.eye(self._size, 2 * self._size))


def adapter_with(candidates: Sequence[int], size: int) -> Any:
    """An adapter whose logits are the second half of a representation."""
    ids_C = torch.tensor(sorted(candidates))
    return SimpleNamespace(
        candidate_ids_C=ids_C,
        head=LMHead(torch.eye(size, 2 * size)[ids_C]),
        logprobs=lambda cr_N_D, previous_N_P: cr_N_D[:, size + ids_C].log_softmax(dim=-1),
    )


def reference(
    logits: tuple[LogitsOf, LogitsOf],
    candidates: Sequence[int],
    grammar: AnswerGrammar,
    stops: StopMatcher,
    weight: float,
) -> list[int]:
    """Token ids behind a prompt of one token 0: the most probable allowed ones of the mixture over all of V."""
    plm, adapter = logits
    state, ids = grammar.begin(), list[int]()
    while len(ids) < STEPS:
        p_plm_V = plm([0, *ids]).double().softmax(-1)
        p_pema_V = torch.zeros_like(p_plm_V)
        if candidates:
            p_pema_V[sorted(candidates)] = adapter([0, *ids]).double()[sorted(candidates)].softmax(-1)
        mixture_V = (1 - weight) * p_plm_V + weight * p_pema_V
        ids.append(int(mixture_V.masked_fill(~state.allowed(), -1.0).argmax()))
        if stops.ends(ids):
            break
        state.append(ids[-1])
    return ids


DECODING = st.builds(
    DecodingSettings,
    max_new_tokens=st.just(STEPS),
    look_ahead=st.sampled_from([0, 2, 8, None]),
    batch_size=st.sampled_from([1, 32]),
)


def config_of(tokenizer: PlmTokenizer, adapter: Any, weight: float, **options: Any) -> GenerationConfig:
    interpolation = Interpolation(schedule="constant" if weight else "none", lambda_max=weight)
    return GenerationConfig(adapter=adapter, interpolation=interpolation, stops=stops_of(tokenizer, "\n"), **options)


@settings(max_examples=scaled(100))
@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.sampled_from([("full", True), ("full", False), ("candidate", False)]),
    st.booleans(),
    DECODING,
)
def test_every_token_is_the_most_probable_allowed_one(
    kind: str, seed: int, weight: float, grants: tuple[str, bool], with_adapter: bool, decoding: DecodingSettings
) -> None:
    tokenizer, chosen = TOKENIZERS[kind], random.Random(seed)
    size = len(tokenizer.token_bytes)
    candidates = chosen.sample(range(size), chosen.choice([3, size // 2])) if with_adapter else []
    weight = weight if with_adapter else 0.0
    plm_logits, adapter_logits = Logits(tokenizer, seed), Logits(tokenizer, seed + 1)
    grammar = AnswerGrammar(AnswerForm(SCHEMA), tokenizer, stops_of(tokenizer, "\n"), size)
    stops = StopMatcher(tokenizer, stops_of(tokenizer, "\n"))
    expected = reference((plm_logits, adapter_logits), candidates, grammar, stops, weight)
    plm: Any = Plm(tokenizer, plm_logits, adapter_logits, grants[0], scope=grants[1])
    adapter = adapter_with(candidates, size) if with_adapter else None
    # Free texts beside it, and drafts that are sometimes right.
    requests = [GenerationRequest([0], 5.0, grammar=grammar), GenerationRequest([1], 5.0)]
    lookup = NgramDrafter([expected]) if chosen.random() < 0.5 else None
    continuations, stats = generate(
        plm, requests, config_of(tokenizer, adapter, weight, settings=decoding, lookup=lookup)
    )
    alone, _ = generate(plm, requests[1:], config_of(tokenizer, adapter, weight, settings=decoding))
    assert stats.unproven == 0
    if weight < 1.0:
        assert continuations[0].token_ids == expected
    assert continuations[1].token_ids == alone[0].token_ids
    _require_held(continuations[0], stops)


def _require_held(continuation: Continuation, stops: StopMatcher) -> None:
    if continuation.end is End.STOP:
        jsonschema.validate(json.loads(continuation.text), SCHEMA)
    else:
        assert continuation.end is End.MAX_TOKENS
        assert len(continuation.token_ids) == STEPS


@settings(max_examples=scaled(150))
@given(SCHEMAS, st.sampled_from(KINDS), st.integers(0, 2**32), st.sampled_from(["\n", "</s>"]), DECODING)
def test_an_answer_that_obeys_already_is_the_same_token_for_token(
    schema_and_answer: SchemaAndAnswer, kind: str, seed: int, end: str, decoding: DecodingSettings
) -> None:
    schema, answer = schema_and_answer
    tokenizer, chosen = TOKENIZERS[kind], random.Random(seed)
    size = len(tokenizer.token_bytes)
    wanted = spell(tokenizer, f" {json_line(answer)}", seed)
    wanted += [eos_of(tokenizer)] if end != "\n" else spell(tokenizer, end, seed)
    # At each position one of the two wants the token, and the other may want anything.
    plm_logits, adapter_logits = Logits(tokenizer, seed, wanted), Logits(tokenizer, seed + 1, wanted)
    weight = chosen.choice([0.0, 0.5, 0.9])
    if weight == 0.9:
        plm_logits = Logits(tokenizer, seed)
    adapter = adapter_with([*wanted, *chosen.sample(range(size), 9)], size)
    plm: Any = Plm(tokenizer, plm_logits, adapter_logits, "none", scope=False)
    decoding = DecodingSettings(
        max_new_tokens=len(wanted) + 5, look_ahead=decoding.look_ahead, batch_size=decoding.batch_size
    )
    config = config_of(tokenizer, adapter, weight, settings=decoding, lookup=NgramDrafter([wanted[: len(wanted) // 2]]))
    grammar = AnswerGrammar(AnswerForm(schema), tokenizer, config.stops, size)
    (free,), _ = generate(plm, [GenerationRequest([0], 5.0)], config)
    (held,), stats = generate(plm, [GenerationRequest([0], 5.0, grammar=grammar)], config)
    assert free.token_ids == wanted
    assert held.choices == free.choices
    assert (held.text, held.end, stats.unproven, plm.calls) == (free.text, End.STOP, 0, 0)


@pytest.mark.slow
@settings(max_examples=scaled(30))
@given(st.sampled_from(KINDS), st.integers(0, 2**32), st.booleans(), st.sampled_from([0.5, 1.5]))
def test_draws_are_allowed_and_do_not_depend_on_drafts(
    kind: str, seed: int, candidates_only: bool, temperature: float
) -> None:
    tokenizer, chosen = TOKENIZERS[kind], random.Random(seed)
    size = len(tokenizer.token_bytes)
    plm: Any = Plm(tokenizer, Logits(tokenizer, seed), Logits(tokenizer, seed + 1), "full", scope=True)
    adapter = adapter_with(chosen.sample(range(size), size // 2), size)
    grammar = AnswerGrammar(AnswerForm(SCHEMA), tokenizer, stops_of(tokenizer, "\n"), size)
    sampling = SamplingSettings(temperature=temperature, candidates_only=candidates_only, seed=seed % 7)
    # The most probable text beside the draws, as of a consensus.
    requests = [GenerationRequest([0], 5.0, sample=sample, grammar=grammar) for sample in (None, 0, 1)]
    texts = []
    for look_ahead in (0, 8, None):
        decoding = DecodingSettings(max_new_tokens=STEPS, look_ahead=look_ahead)
        config = config_of(tokenizer, adapter, 0.6, settings=decoding, sampling=sampling)
        continuations, _ = generate(plm, requests, config)
        texts.append([continuation.token_ids for continuation in continuations])
        for continuation in continuations:
            _require_held(continuation, StopMatcher(tokenizer, config.stops))
    assert texts[0] == texts[1] == texts[2]


def _generate_without_grants(with_adapter: bool) -> tuple[Continuation, GenerationStats, list[int]]:
    tokenizer = TOKENIZERS["gpt2"]
    size = len(tokenizer.token_bytes)
    plm_logits, adapter_logits = Logits(tokenizer, 5), Logits(tokenizer, 6)
    plm: Any = Plm(tokenizer, plm_logits, adapter_logits, "none", scope=False)
    stops = stops_of(tokenizer, "\n")
    grammar = AnswerGrammar(AnswerForm(SCHEMA), tokenizer, stops, size)
    candidates = [n for n, text in enumerate(tokenizer.token_bytes) if text and len(text) == 1 and text.isascii()]
    adapter = adapter_with(candidates, size) if with_adapter else None
    decoding = DecodingSettings(max_new_tokens=STEPS)
    config = config_of(tokenizer, adapter, 0.1 if with_adapter else 0.0, settings=decoding)
    (continuation,), stats = generate(plm, [GenerationRequest([0], 5.0, grammar=grammar)], config)
    return continuation, stats, candidates


def test_without_grants_the_best_candidate_stands_and_is_counted() -> None:
    continuation, stats, candidates = _generate_without_grants(with_adapter=True)
    assert 0 < stats.unproven <= len(continuation.token_ids)
    assert f"{stats.unproven} tokens are the best of the candidates alone" in str(stats)
    assert {*continuation.token_ids} <= {*candidates}


def test_without_grants_and_candidates_the_error_says_what_to_do() -> None:
    with pytest.raises(Unsupported, match="grants nothing") as error:
        _generate_without_grants(with_adapter=False)
    assert "--no-hold" in str(error.value.hint)


@pytest.mark.parametrize(("policy", "scope"), [("candidate", False), ("none", True), ("full", False)])
def test_log_probabilities_of_tokens_outside_the_candidates_are_those_of_the_mixture(
    policy: HeadPolicy, *, scope: bool
) -> None:
    tokenizer = TOKENIZERS["gpt2"]
    size = len(tokenizer.token_bytes)
    plm_logits = Logits(tokenizer, 9)
    plm: Any = Plm(tokenizer, plm_logits, Logits(tokenizer, 10), policy, scope=scope)
    grammar = AnswerGrammar(AnswerForm({"const": 1}), tokenizer, stops_of(tokenizer, "\n"), size)
    config = config_of(tokenizer, adapter_with([4], size), 0.25, settings=DecodingSettings(max_new_tokens=STEPS))
    (continuation,), _ = generate(plm, [GenerationRequest([0], 5.0, grammar=grammar)], config)
    for at, choice in enumerate(continuation.choices):
        logprob_V = plm_logits([0, *continuation.token_ids[:at]]).double().log_softmax(-1)
        assert choice.logprob == pytest.approx(math.log(0.75) + float(logprob_V[choice.token]), abs=1e-4)
    assert json.loads(continuation.text) == 1
    assert plm.calls
