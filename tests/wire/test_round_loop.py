"""The gateway's loop of rounds on a served model: any company, any moment, the same texts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from data_owner_client import Pair, TrainedAdapter, TrainingSettings, build_memories, generate, train, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.options import ChosenOptions
from data_owner_client.decoding.preparation import PreparedTexts, prepare_answers, prepare_continuations, task_for
from data_owner_client.decoding.settings import DecodingSettings, SamplingSettings
from data_owner_client.gateway import round_loop
from data_owner_client.gateway.jobs import GenerationJob
from data_owner_client.gateway.round_loop import RoundLoop
from data_owner_client.plm.remote_plm import RemotePlm
from protocol.errors import ConnectionFailed, Overloaded
from tests import guard
from tests.gateways import FaultyPlm, WatchedPlm

TASK = Task(name="t", source_label="In", target_label="Out", stop="###")
WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
PAIRS = [Pair(" ".join(WORDS[i % 9 :][: 2 + i % 4]), " ".join(WORDS[(3 * i) % 7 :][: 1 + i % 3])) for i in range(24)]
SOURCES = [pair.source for pair in PAIRS[:6]]
ROUNDS = DecodingSettings(batch_size=4)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"interpolation": Interpolation(schedule="constant", lambda_max=0.5)},
    {"interpolation": Interpolation(schedule="gradual", lambda_max=0.9)},
    {"stop": ["e t", "ü"]},
    {"sampling": SamplingSettings(temperature=1.5, seed=3, candidates_only=True), "samples": 3, "best": 3},
    {"decoding": DecodingSettings(max_new_tokens=5)},
]


@pytest.fixture(scope="module")
def plm(tiny_server: str) -> Iterator[RemotePlm]:
    with guard.remote_plm(tiny_server) as remote:
        yield remote


@pytest.fixture(scope="module")
def adapters(plm: RemotePlm, tmp_path_factory: pytest.TempPathFactory) -> list[TrainedAdapter]:
    """Two adapters: one with the task's examples, one with retrieved ones."""
    folder = tmp_path_factory.mktemp("memory")
    build_memories(plm, TASK, PAIRS, folder, validation=PAIRS[:4], context_mode="teacher-forced", share_targets=True)
    settings: dict[str, Any] = {
        "rank": 16,
        "epochs": 3,
        "batch_rows": 16,
        "learning_rate": 0.02,
        "selection_texts": 0,
        "minutes": 0,
    }
    plain = train(plm, folder, folder / "plain", settings=TrainingSettings(retrieved_examples=0, **settings))[0]
    card = plain.card.model_copy(update={"nearest": 2})
    return [plain, TrainedAdapter(card, plain.adapter, plain.candidate_ids_C, plain.head, PAIRS)]


@pytest.fixture
def rounds(plm: RemotePlm) -> Iterator[RoundLoop]:
    loop = RoundLoop(plm, ROUNDS, max_waiting=1000, patience_s=5.0)
    yield loop
    loop.close()


async def _texts(rounds: RoundLoop, prepared: PreparedTexts, *, leave_after: int | None = None) -> list[str]:
    """The texts of a job, put together from its events; perhaps left after some of these."""
    texts, seen = [""] * len(prepared.sequences), 0
    async with aclosing(GenerationJob(rounds, prepared).events()) as events:
        async for event in events:
            texts[event.choice] += event.text
            seen += 1
            if seen == leave_after:
                break
    return texts


def _prepare(plm: RemotePlm, source: str, adapter: TrainedAdapter | None, settings: dict[str, Any]) -> PreparedTexts:
    options = ChosenOptions(**settings)
    if adapter is None:
        return prepare_continuations(plm, [source], None, options)
    return prepare_answers(plm, [source], adapter, task_for(plm, None, adapter), options)


def test_the_plm_alone_takes_few_calls(plm: RemotePlm, rounds: RoundLoop) -> None:
    """All drafts are accepted, so the server drafts many; the texts still grow by pieces."""

    async def calls_and_pieces() -> tuple[int, int]:
        prepared = _prepare(plm, "the", None, {"decoding": DecodingSettings(max_new_tokens=64)})
        async with aclosing(GenerationJob(rounds, prepared).events()) as events:
            pieces = [event.text async for event in events]
        return prepared.sequences[0].calls.round_trips, len([piece for piece in pieces if piece])

    calls, pieces = asyncio.run(calls_and_pieces())
    assert calls <= 64 / 16
    assert pieces > 1


def test_texts_are_those_of_translate_in_any_company(
    plm: RemotePlm, adapters: list[TrainedAdapter], rounds: RoundLoop
) -> None:
    random_ = random.Random(1)
    jobs: list[tuple[TrainedAdapter | None, dict[str, Any], str]] = [
        (adapter, settings, source) for adapter in adapters for settings in SETTINGS for source in SOURCES
    ]
    jobs += [(None, {}, source) for source in SOURCES]
    random_.shuffle(jobs)

    async def one(adapter: TrainedAdapter | None, settings: dict[str, Any], source: str) -> list[str]:
        await asyncio.sleep(random_.random())
        # Every fifth one leaves before its end.
        leave_after = 1 if random_.random() < 0.2 else None
        texts = await _texts(rounds, _prepare(plm, source, adapter, settings), leave_after=leave_after)
        return [] if leave_after else texts

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(one(*job) for job in jobs))

    results = asyncio.run(all_of_them())
    assert sum(map(bool, results)) > len(jobs) / 2
    for (adapter, settings, source), texts in zip(jobs, results, strict=True):
        if not texts:
            continue
        if adapter is None:
            expected = generate(plm, [source], **settings).best[0]
        else:
            expected = translate(plm, [source], adapter=adapter, **settings).best[0]
        assert sorted(texts) == sorted(expected)
    assert (rounds.active, rounds.waiting) == (0, 0)


def _run(plm: Any, prepared: Sequence[PreparedTexts], **settings: Any) -> list[list[str] | BaseException]:
    """The texts of each, or the error that ended it."""
    loop = RoundLoop(plm, ROUNDS, **({"max_waiting": 100, "patience_s": 5.0} | settings))

    async def all_of_them() -> list[list[str] | BaseException]:
        return await asyncio.gather(*(_texts(loop, each) for each in prepared), return_exceptions=True)

    try:
        return asyncio.run(all_of_them())
    finally:
        loop.close()


def test_a_short_absence_of_the_owner_changes_no_text_under_way(plm: RemotePlm, adapters: list[TrainedAdapter]) -> None:
    away = ConnectionFailed("The server is away.", retry_after_s=0.01)
    faulty = FaultyPlm(plm, lambda call: away if call in (2, 3) else None)
    texts = _run(faulty, [_prepare(plm, SOURCES[1], adapters[0], {})])
    assert texts == [translate(plm, [SOURCES[1]], adapter=adapters[0]).best[0]]
    assert faulty.calls > 3


def test_a_refusal_is_handed_on_with_its_time(plm: RemotePlm, adapters: list[TrainedAdapter]) -> None:
    busy = Overloaded("The server is busy.", retry_after_s=7.0)
    faulty = FaultyPlm(plm, lambda call: busy)
    [error, later] = _run(faulty, [_prepare(plm, source, adapters[0], {}) for source in SOURCES[:2]])
    assert isinstance(error, Overloaded)
    assert isinstance(later, Overloaded)
    assert error.retry_after_s == 7.0
    assert faulty.calls == 1


def test_impatience_ends_what_is_under_way(plm: RemotePlm, adapters: list[TrainedAdapter]) -> None:
    away = ConnectionFailed("The server is away.")
    faulty = FaultyPlm(plm, lambda call: away if call > 1 else None)
    [error] = _run(faulty, [_prepare(plm, SOURCES[1], adapters[0], {})], patience_s=0.0)
    assert error is away


def test_more_than_may_wait_are_refused(plm: RemotePlm, adapters: list[TrainedAdapter]) -> None:
    prepared = [_prepare(plm, source, adapters[0], {}) for source in SOURCES * 5]
    results = _run(plm, prepared, max_waiting=3)
    refused = [result for result in results if isinstance(result, Overloaded)]
    answered = [result for result in results if isinstance(result, list)]
    assert len(refused) + len(answered) == len(results)
    assert refused
    assert answered
    assert all(error.retry_after_s for error in refused)


class _CountingPlm(WatchedPlm):
    """A PLM that notes the number of sequences in each call.

    Args:
        plm: the PLM.
        on_call: called with the numbers so far before each call, in the thread of the loop.
    """

    def __init__(self, plm: RemotePlm, on_call: Callable[[list[int]], None]) -> None:
        super().__init__(plm)
        self.sizes = list[int]()
        self._on_call = on_call

    def before_call(self, prompts: Sequence[Sequence[int]]) -> None:
        self.sizes.append(len(prompts))
        self._on_call(self.sizes)


def test_a_client_that_asks_in_turn_misses_no_round(plm: RemotePlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each next text shares a round with the other client's, however long its request takes."""
    short_lengths = [3, 2, 4, 1]
    monkeypatch.setattr(round_loop, "_NEXT_REQUESTS_SHARE", 1e6)

    def wait_no_more(sizes: list[int]) -> None:
        if sizes.count(2) == sum(short_lengths):  # no request follows the last one
            monkeypatch.setattr(round_loop, "_NEXT_REQUESTS_SHARE", 0.0)

    counting: Any = _CountingPlm(plm, wait_no_more)
    loop = RoundLoop(counting, DecodingSettings(batch_size=4, look_ahead=0), max_waiting=10, patience_s=5.0)
    long, *short = (
        _prepare(plm, "the", None, {"decoding": DecodingSettings(max_new_tokens=tokens)})
        for tokens in [64, *short_lengths]
    )

    async def in_turn() -> None:
        for prepared in short:
            await _texts(loop, prepared)
            await asyncio.sleep(0.02)  # longer than a round

    async def both() -> None:
        other = asyncio.create_task(_texts(loop, long))
        await in_turn()
        await other

    try:
        asyncio.run(both())
    finally:
        loop.close()
    # Rounds may begin before the second client's first request comes.
    first = counting.sizes.index(2)
    together = counting.sizes[first : first + sum(short_lengths)]
    assert together == [2] * sum(short_lengths)
    assert set(counting.sizes[first + len(together) :]) == {1}
