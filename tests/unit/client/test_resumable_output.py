"""Long work on texts: interrupted anywhere, it goes on; what failed is tried again."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from data_owner_client.runtime import resumable_output as jobs
from data_owner_client.runtime.progress_display import LineReporter
from data_owner_client.runtime.resumable_output import ResumableOutput
from protocol.errors import InvalidData

TEXTS = [f"text {i}" for i in range(10)]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_TEXTS_PER_WRITE", 3)


class Worker:
    def __init__(self, *, dies_at: int = -1, fails: frozenset[int] = frozenset()) -> None:
        self.dies_at, self.fails = dies_at, fails
        self.asked: list[list[int]] = []

    def __call__(self, numbers: list[int]) -> dict[int, str]:
        self.asked.append(numbers)
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        return {number: TEXTS[number].upper() for number in numbers if number not in self.fails}


class Answers:
    """Answers that are the texts."""

    def __init__(self, texts: list[str], *, dies_at: int = -1) -> None:
        self.texts, self.dies_at, self.calls = texts, dies_at, 0

    def __call__(self, numbers: list[int]) -> dict[int, str]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return {number: self.texts[number] for number in numbers}


def expected() -> str:
    return "".join(text.upper() + "\n" for text in TEXTS)


@pytest.mark.parametrize("dies_at", [1, 2, 4])
def test_an_interrupted_job_goes_on_where_it_was(tmp_path: Path, dies_at: int) -> None:
    output = tmp_path / "new" / "out.txt"
    with pytest.raises(KeyboardInterrupt):
        ResumableOutput(output, "a").write(TEXTS, Worker(dies_at=dies_at))
    assert not output.exists()
    for half in output.parent.glob(".*"):  # a kill in the middle of a write
        half.write_bytes(half.read_bytes() + b'{"job": "x", "num')
    worker = Worker()
    assert ResumableOutput(output, "a").write(TEXTS, worker) == 3 * (dies_at - 1)
    assert sum(map(len, worker.asked)) == len(TEXTS) - 3 * (dies_at - 1)
    assert output.read_text() == expected()
    assert list(output.parent.iterdir()) == [output]


def test_what_failed_is_named_and_tried_again(tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    with pytest.raises(InvalidData, match="2 of 10 texts have no answer, text 5 for one"):
        ResumableOutput(output, "a").write(TEXTS, Worker(fails=frozenset({4, 9})))
    worker = Worker()
    ResumableOutput(output, "a").write(TEXTS, worker)
    assert worker.asked == [[4, 9]]
    assert output.read_text() == expected()


def test_mending_one_text_keeps_the_others(tmp_path: Path) -> None:
    output, mended = tmp_path / "out.txt", ["a new one", *TEXTS[1:]]
    with pytest.raises(InvalidData):
        ResumableOutput(output, "a").write(TEXTS, Worker(fails=frozenset({0})))
    asked: list[list[int]] = []

    def work(numbers: list[int]) -> dict[int, str]:
        asked.append(numbers)
        return {number: mended[number].upper() for number in numbers}

    assert ResumableOutput(output, "a").write(mended, work) == 9
    assert asked == [[0]]
    assert output.read_text() == expected().replace("TEXT 0", "A NEW ONE")


def test_another_job_takes_nothing_over(tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    with pytest.raises(KeyboardInterrupt):
        ResumableOutput(output, {"adapter": 1}).write(TEXTS, Worker(dies_at=3))
    with pytest.raises(KeyboardInterrupt):
        ResumableOutput(output, {"adapter": 2}).write(TEXTS, Worker(dies_at=2))
    # The other way round, neither takes anything away.
    assert ResumableOutput(output, {"adapter": 1}).write(TEXTS, Worker()) == 6
    assert output.read_text() == expected()


def test_an_answer_of_several_lines_is_one_line_of_the_file(tmp_path: Path) -> None:
    output, ends = tmp_path / "out.txt", "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    texts = [f"one{end}two" for end in ends]
    with pytest.raises(KeyboardInterrupt):
        ResumableOutput(output, "a").write(texts, Answers(texts, dies_at=2))
    ResumableOutput(output, "a").write(texts, Answers(texts))
    assert output.read_text(encoding="utf-8").splitlines() == ["one two"] * len(ends)


def test_the_progress_is_that_of_all_texts(tmp_path: Path) -> None:
    output, lines = tmp_path / "out[b].txt", list[str]()
    with pytest.raises(KeyboardInterrupt):
        ResumableOutput(output, "a").write(TEXTS, Worker(dies_at=2))
    ResumableOutput(output, "a").write(TEXTS, Worker(), LineReporter(lines.append))
    (line,) = lines
    assert line.startswith("out[b].txt: 10 of 10 texts in ")


def test_a_finished_job_is_done_anew(tmp_path: Path) -> None:
    for _ in range(2):
        worker = Worker()
        ResumableOutput(tmp_path / "out.txt", "a").write(TEXTS, worker)
        assert len(worker.asked) == 4


def test_memory_does_not_hold_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_TEXTS_PER_WRITE", 100)
    texts, answer = [str(number) for number in range(1000)], "word " * 2000

    def work(numbers: list[int]) -> dict[int, str]:
        return {number: f"{answer}{number}" for number in numbers}

    tracemalloc.start()
    ResumableOutput(tmp_path / "out.txt", "a").write(texts, work)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out.txt").stat().st_size > 10_000_000
    assert peak < 4_000_000
