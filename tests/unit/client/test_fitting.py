"""The verb `train`: which rows of a memory are learned, and in which form."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_owner_client import Pair, RemotePlm, TrainedAdapter, TrainingSettings, build_memories, train
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.tasks import Task
from data_owner_client.data.tasks.kinds import Kind
from data_owner_client.decoding.results import Generation
from data_owner_client.decoding.stats import GenerationStats
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import resolve_settings
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData

TASK = Task(name="t", source_label="In", target_label="Out")
PAIRS = [Pair(f"the thin {number}", "die Tür " * (1 + number % 3) + str(number)) for number in range(20)]
QUICK = TrainingSettings(rank=4, epochs=2, minutes=0, selection_texts=0)


def make_plan(mode: Any, cr_kind: Any = "last_hidden_state") -> MemoryPlan:
    return MemoryPlan(
        model=ModelIdentity(name="m", digest="d" * 64, cr_kind=cr_kind, hidden_size=12, vocab_size=14),
        task=TASK,
        context_mode=mode,
        dtype="float16",
        with_logsumexp=True,
        data_digest="",
        examples=1,
        examples_per_shard=1,
    )


class Stopping(Reporter):
    """Stops the training as soon as something is said that begins so."""

    def __init__(self, begin: str = "never") -> None:
        self.begin, self.said = begin, list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)
        if text.startswith(self.begin):
            raise KeyboardInterrupt


@pytest.fixture
def plm(tiny_service: PlmService) -> RemotePlm:
    return RemotePlm(InProcessConnection(tiny_service), cache=None)


@pytest.fixture
def memory(plm: RemotePlm, tmp_path: Path) -> Path:
    build_memories(plm, TASK, PAIRS, tmp_path / "memory", validation=PAIRS[:4])
    return tmp_path / "memory"


def test_the_pairing_that_finds_held_out_targets_likelier_is_kept(plm: RemotePlm, memory: Path, tmp_path: Path) -> None:
    _, report = train(plm, memory, tmp_path / "adapter", settings=QUICK)
    aligned, reliable = report.trials
    assert [aligned.settings["pairing"], reliable.settings["pairing"]] == ["aligned", "reliable"]
    better = min(aligned, reliable, key=lambda trial: trial.nll)
    assert report.card.settings == better.settings
    assert report.card.form == better.settings["form"]


def test_a_training_that_is_stopped_between_two_pairings_ends_in_the_same_adapter(
    plm: RemotePlm, memory: Path, tmp_path: Path
) -> None:
    undisturbed, whole = train(plm, memory, tmp_path / "undisturbed", settings=QUICK)
    with pytest.raises(KeyboardInterrupt):
        train(plm, memory, tmp_path / "stopped", settings=QUICK, reporter=Stopping("Tried recent"))
    assert len(list((tmp_path / "stopped").glob(".training-*"))) == 1, "the first training was kept"
    resumed, again = train(plm, memory, tmp_path / "stopped", settings=QUICK)
    assert again.trials == whole.trials
    for name, weight in undisturbed.adapter.state_dict().items():
        assert torch.equal(resumed.adapter.state_dict()[name], weight), name
    assert not list((tmp_path / "stopped").glob(".training-*"))


def test_what_is_said_names_the_pairing(plm: RemotePlm, memory: Path, tmp_path: Path) -> None:
    reporter = Stopping()
    train(plm, memory, tmp_path / "adapter", settings=QUICK, reporter=reporter)
    tried = [text for text in reporter.said if text.startswith("Tried")]
    assert ["pairing aligned" in tried[0], "pairing reliable" in tried[1], len(tried)] == [True, True, 2]


@pytest.mark.parametrize(
    ("mode", "asked", "found"),
    [
        ("teacher-forced", {}, [("residual", "aligned")]),
        ("private", {}, [("recent", "aligned"), ("residual", "reliable")]),
        ("private", {"form": "residual"}, [("residual", "aligned"), ("residual", "reliable")]),
        ("private", {"form": "recent"}, [("recent", "aligned")]),
        ("private", {"pairing": "reliable"}, [("residual", "reliable")]),
        ("private", {"pairing": "by_position"}, [("residual", "by_position")]),
    ],
)
def test_what_is_left_open_suits_the_memory(mode: Any, asked: dict[str, Any], found: list[tuple[str, str]]) -> None:
    assert [(each.form, each.pairing) for each in resolve_settings(TrainingSettings(**asked), make_plan(mode))] == found


def test_forms_that_do_not_suit_are_refused() -> None:
    with pytest.raises(InvalidData, match="pairing reliable has none of these"):
        resolve_settings(TrainingSettings(form="recent", pairing="reliable"), make_plan("private"))
    with pytest.raises(InvalidData, match="this memory holds ffn_output"):
        resolve_settings(TrainingSettings(form="residual"), make_plan("private", "ffn_output"))
    assert resolve_settings(TrainingSettings(), make_plan("teacher-forced", "ffn_output"))[0].form == "paper"


class TickingClock:
    """A clock that moves a step with every reading."""

    def __init__(self, seconds: float) -> None:
        self.now, self.step = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.step
        return self.now


TIMED = TrainingSettings(rank=4, epochs=2, selection_texts=2)


@pytest.fixture
def shared_memory(plm: RemotePlm, tmp_path: Path) -> Path:
    build_memories(
        plm,
        TASK,
        PAIRS,
        tmp_path / "shared",
        validation=PAIRS[:4],
        context_mode="teacher-forced",
        share_targets=True,
    )
    return tmp_path / "shared"


def test_with_time_enough_all_is_done_as_it_was_said(plm: RemotePlm, shared_memory: Path, tmp_path: Path) -> None:
    reporter = Stopping()
    clock = TickingClock(0.001)
    _, report = train(plm, shared_memory, tmp_path / "a", settings=TIMED, reporter=reporter, clock=clock)
    plan = next(number for number, line in enumerate(reporter.said) if line.startswith("Within 15 minutes: a training"))
    assert all(
        words in reporter.said[plan] for words in ("a search for better", "retrieved examples", "2 held-out texts")
    )
    assert not [line for line in reporter.said[:plan] if line.startswith("Tried")]
    assert not [line for line in reporter.said if line.startswith("Left out")]
    assert len(report.trials) > 1, "the search"
    assert {policy.nearest for policy in report.options} == {0, 8}
    assert [policy for policy in report.options if policy.scores is not None]


def test_members_are_averaged_and_a_stopped_call_goes_on_to_the_same_average(
    plm: RemotePlm, shared_memory: Path, tmp_path: Path
) -> None:
    # Of settings that the user gave, only the seed is changed.
    given: dict[str, Any] = {"form": "residual", "learning_rate": 0.02, "dropout": 0.3, "kappa": 0.3}
    settings, clock = replace(TIMED, members=3, batch_rows=16, epochs=6, **given), TickingClock(0.001)
    reporter = Stopping()
    whole, report = train(plm, shared_memory, tmp_path / "whole", settings=settings, reporter=reporter, clock=clock)
    assert [trial.settings["seed"] for trial in report.trials] == [0, 1, 2]
    assert len(whole.card.members) in {2, 3}
    assert sum(member.weight for member in whole.card.members) == pytest.approx(1.0)
    assert f"Averaged: {len(whole.card.members)} of {len(report.trials)} trainings." in reporter.said
    alone = min(trial.nll for trial in report.trials)
    likeliest = min(option.nll for option in report.options if option.nearest == 0)
    assert likeliest < alone
    with pytest.raises(KeyboardInterrupt):
        train(
            plm,
            shared_memory,
            tmp_path / "stopped",
            settings=settings,
            reporter=Stopping("Tried residual"),
            clock=clock,
        )
    resumed = train(plm, shared_memory, tmp_path / "stopped", settings=settings, clock=clock)[0]
    assert resumed.card.members == whole.card.members
    for name, weight in TrainedAdapter.load(tmp_path / "whole").adapter.state_dict().items():
        assert torch.equal(resumed.adapter.state_dict()[name], weight), name


def test_without_time_the_training_is_done_and_the_rest_is_named(
    plm: RemotePlm, shared_memory: Path, tmp_path: Path
) -> None:
    reporter = Stopping()
    settings, clock = replace(TIMED, minutes=1), TickingClock(20.0)
    _, report = train(plm, shared_memory, tmp_path / "b", settings=settings, reporter=reporter, clock=clock)
    (left_out,) = (line for line in reporter.said if line.startswith("Left out"))
    for what in ("retrieved examples", "a choice by decoded texts", "a search for better settings"):
        assert f"{what} (included with --minutes " in left_out
    assert len(report.trials) == 1
    assert {policy.nearest for policy in report.options} == {0}
    assert all(policy.scores is None for policy in report.options)


def test_zero_minutes_are_the_training_alone(plm: RemotePlm, shared_memory: Path, tmp_path: Path) -> None:
    reporter = Stopping()
    _, report = train(plm, shared_memory, tmp_path / "c", settings=replace(TIMED, minutes=0), reporter=reporter)
    assert not [line for line in reporter.said if line.startswith(("Within", "Left out", "Tried"))]
    assert len(report.trials) == 1
    assert all(policy.scores is None and not policy.nearest for policy in report.options)


def test_a_call_that_goes_on_decodes_no_text_again(plm: RemotePlm, memory: Path, tmp_path: Path) -> None:
    settings = replace(TIMED, search=False)
    whole = train(plm, memory, tmp_path / "whole", settings=settings)[1]
    with pytest.raises(KeyboardInterrupt):
        train(plm, memory, tmp_path / "stopped", settings=settings, reporter=Stopping("constant with λ_max 0.60"))
    stored = set((tmp_path / "stopped").glob(".training-*.json"))
    assert stored, "decoded texts are kept"
    reporter = Stopping()
    again = train(plm, memory, tmp_path / "stopped", settings=settings, reporter=reporter)[1]
    assert again.options == whole.options
    assert not list((tmp_path / "stopped").glob(".training-*"))


def test_decoded_texts_that_are_left_out_after_all_are_named(
    plm: RemotePlm, shared_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, reporter = [0.0], Stopping()
    say = reporter.say

    def say_slowly(text: str) -> None:
        say(text)
        now[0] += 1e6 * text.startswith("Within")  # the training takes longer than estimated

    monkeypatch.setattr(reporter, "say", say_slowly)
    settings = replace(TIMED, search=False)
    report = train(plm, shared_memory, tmp_path / "a", settings=settings, reporter=reporter, clock=lambda: now[0])[1]
    assert report.options[0].scores is None
    assert "Left out: the choice by decoded texts. What came before took longer than estimated." in reporter.said


NAMES = ("wohnzimmerlampean", "wohnzimmerlampeaus")
NAMED_PAIRS = [Pair(f"the thin {number}", NAMES[number % 2]) for number in range(20)]


def fake_translation(_: RemotePlm, sources: Sequence[str], *, interpolation: Interpolation, **__: Any) -> Generation:
    """Wrong answers that are near the right ones with a large λ; else every second answer is right."""
    right = [NAMES[int(source.split()[-1]) % 2] for source in sources]
    if interpolation.lambda_max > 0.5:
        texts = [NAMES[1 - NAMES.index(text)] for text in right]
    else:
        texts = [text if number % 4 < 2 else "küche" for number, text in enumerate(right)]
    return Generation([[text] for text in texts], [[] for _ in texts], GenerationStats(), 0.0)


@pytest.mark.parametrize(("kind", "metric", "low"), [("rewrite", "chrF", False), ("answer", "F1", True)])
def test_the_metric_of_the_kind_chooses(
    plm: RemotePlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, metric: str, low: bool
) -> None:
    monkeypatch.setattr("data_owner_client.training.decoding_policy.translate", fake_translation)
    task = Task(name="t", kind=kind)
    build_memories(plm, task, NAMED_PAIRS, tmp_path / "memory", validation=NAMED_PAIRS)
    settings = replace(TIMED, epochs=1, gate=False, search=False, pairing="aligned", selection_texts=20)
    reporter = Stopping()
    _, report = train(plm, tmp_path / "memory", tmp_path / "a", settings=settings, reporter=reporter)
    assert (report.card.interpolation.lambda_max < 0.5) == low
    assert f"{metric} " in report.card.interpolation_why
    assert report.options[0].scores is not None
    assert [line for line in reporter.said if line.endswith("on 20 validation texts.") and f"{metric} " in line]


def test_labels_have_no_length_reward(plm: RemotePlm, tmp_path: Path) -> None:
    task = Task(name="t", kind="classify", labels=NAMES)
    build_memories(plm, task, NAMED_PAIRS, tmp_path / "memory", validation=NAMED_PAIRS[:4])
    settings = replace(TIMED, epochs=1, gate=False, search=False, pairing="aligned")
    _, report = train(plm, tmp_path / "memory", tmp_path / "a", settings=settings)
    assert {policy.interpolation.length_reward for policy in report.options} == {0.0}
    assert {key for policy in report.options for key in policy.scores or {}} == {"accuracy", "macro_f1"}
