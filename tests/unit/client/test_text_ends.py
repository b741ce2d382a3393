"""Ends of texts in decoding, against a loop over the tokens, with every kind of draft; and what bounds learn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_owner_client.adapter.bounds import TextBounds
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.cli import generation
from data_owner_client.data.repetition import RepetitionDetector, longest_repetition
from data_owner_client.data.stops import Stops
from data_owner_client.decoding.client_drafts import NgramDrafter
from data_owner_client.decoding.decode_loop import GenerationConfig, GenerationRequest, generate
from data_owner_client.decoding.sequence import End
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.plm.tokenizer import PlmTokenizer, Prompt
from harness.tiny_models import EOS, VOCAB_SIZE, tiny_tokenizer
from protocol.head import LMHead
from protocol.messages import DecodeResponse, TokenizerBundle
from tests.profiles import scaled

V = VOCAB_SIZE
MAX_TOKENS = 40
LOGIT = 8.0
TOKENIZER = PlmTokenizer(
    TokenizerBundle(
        tokenizer_json=tiny_tokenizer().backend_tokenizer.to_str(),
        chat_template=None,
        special_tokens={"eos_token": "<eos>"},
    )
)
ALPHABET = [*TOKENIZER.encode_prompt(Prompt("ab#é\n", with_special_tokens=False)), EOS]


@dataclass(frozen=True)
class Script:
    """The tokens that adapter and PLM want at each position of a text, whatever stands before."""

    adapter: list[int]
    plm: list[int]

    def tokens(self, lambdas: Sequence[float]) -> list[int]:
        """The mixture's tokens: of two nearly certain distributions the one with more weight wins."""
        return [a if weight > 0.5 else p for a, p, weight in zip(self.adapter, self.plm, lambdas, strict=True)]


class ScriptedPlm:
    """A server that drafts what the scripts say. The last token of a prompt of two is the number of its script."""

    tokenizer = TOKENIZER

    def __init__(self, scripts: Sequence[Script]) -> None:
        self._scripts = scripts
        limits = {"max_sequence_tokens": 1000, "max_sequences": 100, "max_rows": 10_000, "max_look_ahead": 64}
        self.card = SimpleNamespace(limits=SimpleNamespace(**limits))

    @contextmanager
    def observed_by(self, observer: Any) -> Iterator[None]:
        yield

    def decode(
        self,
        prefixes: Sequence[Sequence[int]],
        look_ahead: Sequence[int],
        stop_ids: Sequence[int] = (),
        *,
        from_position: Sequence[int],
    ) -> DecodeResponse:
        rows, top1 = list[torch.Tensor](), list[int]()
        counts = []
        for ids, drafts, start in zip(prefixes, look_ahead, from_position, strict=True):
            script, ts = self._scripts[ids[1]], list(range(start - 1, len(ids) - 1))
            for _ in range(drafts):
                if script.plm[ts[-1]] in stop_ids:
                    break
                ts.append(ts[-1] + 1)
            counts.append(len(ts))
            for t in ts:
                row = torch.zeros(2, V)
                row[0, script.plm[t]] = row[1, script.adapter[t]] = LOGIT
                rows.append(row.flatten())
                top1.append(script.plm[t])
        logsumexp = math.log(math.exp(LOGIT) + V - 1)
        return DecodeResponse(
            digest="d" * 64,
            echo=[0] * len(prefixes),
            rows_B=torch.tensor(counts),
            cr_N_D=torch.stack(rows),
            logsumexp_N=torch.full((len(rows),), logsumexp),
            top1_N=torch.tensor(top1),
            top1_logprob_N=torch.full((len(rows),), LOGIT - logsumexp),
        )


ADAPTER: Any = SimpleNamespace(
    candidate_ids_C=torch.arange(V),
    head=LMHead(torch.eye(V, 2 * V)),
    logprobs=lambda cr_N_D, previous: cr_N_D[:, V:].log_softmax(dim=-1),
)


def naive_repetition(ids: Sequence[int]) -> int:
    """Repeated tokens at the end of a text."""
    runs = dict.fromkeys(range(1, len(ids)), 0)
    for p in runs:
        while runs[p] < len(ids) - p and ids[-1 - runs[p]] == ids[-1 - runs[p] - p]:
            runs[p] += 1
    return max((run for p, run in runs.items() if run >= 2 * p), default=0)


def naive_text(tokens: Sequence[int], stops: Stops, limit: int | None, bound: int | None) -> tuple[list[int], str, End]:
    """Tokens, text and end of a text whose tokens come one by one."""
    ids: list[int] = []
    for token in tokens[:bound]:
        ids.append(token)
        text = TOKENIZER.decode_continuation(ids)
        found = [text.find(stop) for stop in stops.texts if stop in text]
        if found:
            return ids, text[: min(found)], End.STOP
        if token in stops.ids:
            return ids, TOKENIZER.decode_continuation(ids[:-1]), End.STOP
        repeated = naive_repetition(ids)
        if limit is not None and repeated >= limit:
            ids = ids[:-repeated]
            return ids, TOKENIZER.decode_continuation(ids), End.REPETITION
    cut = bound is not None and bound < len(tokens)
    return ids, TOKENIZER.decode_continuation(ids), End.LENGTH_BOUND if cut else End.MAX_TOKENS


class Reported:
    """The tokens of each text that were called final."""

    def __init__(self, texts: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(texts)]

    def add(self, number: int, token: int) -> None:
        self.ids[number].append(token)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Texts of few tokens, blocks of which come again; the PLM often wants the same as the adapter."""
    block = st.lists(st.sampled_from(ALPHABET[: draw(st.sampled_from([2, 3, len(ALPHABET)]))]), min_size=1, max_size=5)
    repeated = st.builds(lambda part, times: part * times, block, st.integers(1, 8))
    ids = [i for part in draw(st.lists(repeated, min_size=1, max_size=6)) for i in part]
    adapter = (ids * MAX_TOKENS)[:MAX_TOKENS]
    other = draw(st.lists(st.sampled_from([None, None, *ALPHABET]), min_size=MAX_TOKENS, max_size=MAX_TOKENS))
    return Script(adapter, [a if o is None else o for a, o in zip(adapter, other, strict=True)])


@settings(max_examples=scaled(300))
@given(
    st.lists(scripts(), min_size=1, max_size=4),
    st.lists(st.sampled_from(["##", "a#b", "\n", "é", "b\n\n"]), max_size=2),
    st.sampled_from([None, 3, 6, 16]),
    st.sampled_from([None, 5, 17, MAX_TOKENS + 5]),
    st.sampled_from(
        [Interpolation(schedule="constant", lambda_max=0.9), Interpolation(schedule="linear", lambda_max=1.0)]
    ),
)
def test_texts_end_the_same_whatever_is_drafted(
    cases: list[Script], stop: list[str], limit: int | None, bound: int | None, interpolation: Interpolation
) -> None:
    stops, length = Stops(tuple(stop), frozenset([EOS])), 13.3
    lambdas = interpolation.lambdas(torch.arange(MAX_TOKENS), torch.tensor(length)).tolist()
    expected = [naive_text(case.tokens(lambdas), stops, limit, bound) for case in cases]
    requests = [GenerationRequest([1, n], length, length_bound=bound) for n in range(len(cases))]
    lookup = NgramDrafter(case.adapter for case in cases)
    plm: Any = ScriptedPlm(cases)
    for look_ahead, batch_size, drafter in ((0, 1, None), (1, 4, None), (4, 2, None), (None, 4, None), (0, 4, lookup)):
        config = GenerationConfig(
            ADAPTER,
            interpolation,
            stops,
            limit,
            DecodingSettings(max_new_tokens=MAX_TOKENS, look_ahead=look_ahead, batch_size=batch_size),
            lookup=drafter,
        )
        reported = Reported(len(cases))
        found, stats = generate(plm, requests, config, on_token=reported.add)
        assert [(one.token_ids, one.text, one.end) for one in found] == expected
        # A token is reported when it is final, so none is ever taken back.
        assert reported.ids == [ids for ids, _, _ in expected]
        assert stats.length_bound_ends == sum(end is End.LENGTH_BOUND for _, _, end in expected)
        assert stats.repetition_ends == sum(end is End.REPETITION for _, _, end in expected)
        assert stats.tokens == sum(len(ids) for ids, _, _ in expected)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetitions_are_those_of_a_slow_search(ids: list[int]) -> None:
    detector = RepetitionDetector()
    found = [detector.append(token) for token in ids]
    assert found == [naive_repetition(ids[: at + 1]) for at in range(len(ids))]
    assert longest_repetition([ids]) == max(found, default=0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x" + "abc" * 7, "xabc"),
        ("a" * 17, "a"),
        ("no loop" + "ab" * 9 + "a", "no loopab"),
        ("ab" * 8, "ab" * 8),  # 14 repeated tokens
        ("abcdefghijkl" * 2 + "abcdefghijk", "abcdefghijkl" * 2 + "abcdefghijk"),  # not yet three times
        ("abcdefghijkl" * 3, "abcdefghijkl"),
    ],
)
def test_a_text_ends_where_its_repetition_began(text: str, kept: str) -> None:
    limit, detector, ids = TextBounds(length_ratio=1, length_spread=1, longest_repetition=0), RepetitionDetector(), ""
    for character in text:
        ids += character
        if (repeated := detector.append(ord(character))) >= limit.repetition_limit:
            ids = ids[:-repeated]
            break
    assert ids == kept


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=5))
def test_no_target_of_the_memory_would_be_cut_as_a_repetition(targets: list[list[int]]) -> None:
    longest = longest_repetition(targets)
    limit = TextBounds(length_ratio=1.0, length_spread=1.0, longest_repetition=longest).repetition_limit
    for target in targets:
        detector = RepetitionDetector()
        assert all(detector.append(token) < limit for token in target)


LENGTHS = st.integers(1, 400).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 80), min_size=n, max_size=n), st.lists(st.integers(1, 200), min_size=n, max_size=n)
    )
)


@given(LENGTHS)
def test_nearly_all_targets_are_within_the_length_bound(lengths: tuple[list[int], list[int]]) -> None:
    source, target = lengths
    bounds = TextBounds.from_lengths(torch.tensor(target), torch.tensor(source), 0)
    longer = sum(t > bounds.max_tokens(s) for s, t in zip(source, target, strict=True))
    assert longer <= len(source) // 100
    assert TextBounds.model_validate_json(bounds.model_dump_json()) == bounds


@pytest.mark.parametrize("ratio", [0.1, 1.0, 1.6, 4.0])
def test_targets_of_one_ratio_leave_room(ratio: float) -> None:
    """A memory may show no spread at all, and its texts still vary."""
    source_E = torch.arange(1, 60)
    bounds = TextBounds.from_lengths((ratio * source_E).ceil().int(), source_E, 0)
    for source in (1, 5, 20, 100):
        expected = bounds.length_ratio * source
        assert expected + 2 * math.sqrt(expected) < bounds.max_tokens(source) <= 2 * expected + 10 + 5 * ratio


def test_the_usage_says_how_texts_ended() -> None:
    first, second = GenerationStats(length_bound_ends=2), GenerationStats(repetition_ends=1)
    assert str(first + second).endswith("; 2 texts ended at the length bound, 1 text ended at a repetition")
    assert str(second).endswith("of work on this side; 1 text ended at a repetition")
    assert str(GenerationStats()).endswith("of work on this side")


def changing(decoding: DecodingSettings) -> list[object]:
    return generation._Options(decoding=decoding).changing(None)


@pytest.mark.parametrize("change", [{"max_new_tokens": 9}, {"length_bound": False}, {"repetition_bound": True}])
def test_a_file_begun_with_other_bounds_is_not_continued(change: dict[str, Any]) -> None:
    assert changing(DecodingSettings(**change)) != changing(DecodingSettings())


@pytest.mark.parametrize("same", [{"look_ahead": 0}, {"batch_size": 2}])
def test_a_file_may_be_continued_with_other_drafts_and_batches(same: dict[str, Any]) -> None:
    assert changing(DecodingSettings(**same)) == changing(DecodingSettings())


def test_the_stops_of_a_file_belong_to_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def record(_inputs: list[str], _run: Any, identity: list[object], *_: object, **__: object) -> None:
        seen.append(json.dumps(identity, default=str))

    plm = SimpleNamespace(card=SimpleNamespace(digest="d"), tokenizer=None)
    monkeypatch.setattr(generation, "connected", lambda *_: nullcontext(plm))
    monkeypatch.setattr("data_owner_client.cli.output.write_texts", record)
    for stop in ([], ["a"], ["a", "b"]):
        generation.generate(["x"], stop=stop)
    assert len(set(seen)) == 3
