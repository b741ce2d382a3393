"""The window of requests in flight, and the requests in it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.memory import request_batches as planning
from data_owner_client.memory.request_batches import ExampleSizes, split_into_requests
from data_owner_client.plm.connection.base import Attempt
from data_owner_client.plm.connection.in_flight import InFlightWindow, ordered_map
from protocol.messages import Limits, ModelCard
from protocol.timing import ServerTiming


def exchange(queue_ms: float, compute_ms: float) -> Attempt:
    return Attempt("encode", "id", 1.0, timing=ServerTiming(queue_ms, compute_ms, 0.0))


REFUSED = Attempt("encode", "id", 0.1, refused=True)
JUST_RIGHT = exchange(queue_ms=9, compute_ms=10)


def test_the_window_grows_while_the_server_idles_and_shrinks_while_it_is_crowded() -> None:
    window = InFlightWindow(largest=5)
    for _ in range(9):
        window.observe(exchange(queue_ms=0.1, compute_ms=10))
    assert window.size == 5
    for _ in range(9):
        window.observe(JUST_RIGHT)
        window.observe(Attempt("encode", "id", 1.0))
    assert window.size == 5
    for _ in range(9):
        window.observe(exchange(queue_ms=100, compute_ms=10))
    assert window.size == 2


def test_refusals_halve_the_window_once_until_an_answer_comes() -> None:
    window = InFlightWindow(start=16)
    for _ in range(5):
        window.observe(REFUSED)
    assert window.size == 8
    for _ in range(3):
        window.observe(JUST_RIGHT)
        window.observe(REFUSED)
    assert window.size == 1
    window.observe(REFUSED)
    assert window.size == 1
    window.observe(exchange(queue_ms=100, compute_ms=10))  # an answer, be it a late one
    assert window.size == 2


@pytest.mark.parametrize("size", [1, 2, 7])
def test_as_many_calls_as_the_window_says_run_ahead(size: int) -> None:
    lock, running, most = threading.Lock(), 0, 0
    all_of_the_first = threading.Barrier(size)

    def call(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if item < size:
            all_of_the_first.wait(timeout=60)
        time.sleep(0.005)  # long enough to be seen beside one too many
        with lock:
            running -= 1
        return item * item

    window = InFlightWindow(start=size, largest=8)
    assert list(ordered_map(call, range(40), window)) == [i * i for i in range(40)]
    assert most == size


def test_an_error_ends_the_pipeline_and_calls_nothing_more() -> None:
    called: list[int] = []

    def call(item: int) -> int:
        called.append(item)
        if item == 3:
            raise ValueError("no")
        return item

    with pytest.raises(ValueError, match="no"):
        list(ordered_map(call, range(100), InFlightWindow(start=2)))
    assert len(called) < 8


def card(**limits: int) -> ModelCard:
    given: dict[str, Any] = {"max_sequence_tokens": 10**6, "max_sequences": 10**6, "max_head_rows": 1}
    given |= {"max_look_ahead": 10**6, "max_rows": 10**6, "max_body_bytes": 10**9}
    return ModelCard(
        name="m",
        digest="d" * 64,
        tokenizer_digest="e" * 64,
        cr_kind="last_hidden_state",
        hidden_size=64,
        vocab_size=10,
        dtype="float32",
        head_dtype="float32",
        head_digest="f" * 64,
        head_policy="full",
        eos_token_ids=[],
        limits=Limits(**given | limits),
    )


examples = st.lists(st.integers(1, 400).flatmap(lambda s: st.tuples(st.just(s), st.integers(1, s))), max_size=60)


@given(
    examples=examples,
    shard=st.integers(1, 20),
    shards_done=st.integers(0, 3),
    sequences=st.integers(1, 9),
    rows=st.integers(400, 1000),
    body=st.integers(3200, 20000),
)
def test_requests_hold_every_example_once_within_all_limits(
    examples: list[tuple[int, int]], shard: int, shards_done: int, sequences: int, rows: int, body: int
) -> None:
    sizes = ExampleSizes()
    for sequence, target in examples:
        sizes.append(sequence, target)
    done = min(shard * shards_done, len(examples))
    limited = card(max_sequences=sequences, max_rows=rows, max_body_bytes=body)
    runs = list(split_into_requests(sizes, limited, "float16", done=done, examples_per_shard=shard))
    assert [i for run in runs for i in run] == list(range(done, len(examples)))
    for run in runs:
        own = [examples[i] for i in run]
        assert len(own) <= sequences
        assert sum(target for _, target in own) <= rows
        assert 8 * sum(sequence for sequence, _ in own) <= body
        assert run.start // shard == (run.stop - 1) // shard
    # The rest of a build is the same whatever was done before.
    whole = list(split_into_requests(sizes, limited, "float16", done=0, examples_per_shard=shard))
    assert runs == [run for run in whole if run.start >= done]


def test_requests_are_as_large_as_they_may_be() -> None:
    sizes = ExampleSizes()
    for _ in range(1000):
        sizes.append(20, 5)
    runs = list(split_into_requests(sizes, card(), "float16", done=0, examples_per_shard=512))
    assert [len(run) for run in runs] == [*[64] * 15, 40]
    long = ExampleSizes()
    for _ in range(100):
        long.append(4096, 100)
    runs = list(split_into_requests(long, card(), "float16", done=0, examples_per_shard=512))
    assert {len(run) * 4096 for run in runs[:-1]} == {planning._TOKENS_PER_REQUEST}
