"""The verb `train` on a private memory: which of its rows are learned."""

from pathlib import Path

import pytest
import torch

from data_owner_client import Pair, RemotePlm, TrainingSettings, build_memories, train
from data_owner_client.connection.in_process import InProcessConnection
from data_owner_client.progress import Reporter
from data_owner_client.tasks import Task
from plm_owner_server.service import PlmService

TASK = Task(name="t", source_label="In", target_label="Out")
PAIRS = [Pair(f"the thin {number}", "die Tür " * (1 + number % 3) + str(number)) for number in range(20)]
QUICK = TrainingSettings(rank=4, epochs=2, minutes=0, decoded=0)


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
    aligned, sure = report.trials
    assert [aligned.settings["pairing"], sure.settings["pairing"]] == ["aligned", "sure"]
    better = min(aligned, sure, key=lambda trial: trial.nll)
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
    assert ["pairing aligned" in tried[0], "pairing sure" in tried[1], len(tried)] == [True, True, 2]
