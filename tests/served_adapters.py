"""Adapters of the tiny PLM that a gateway serves, with different mixtures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from data_owner_client import Pair, TrainedAdapter, TrainingSettings, build_memories, train
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.train import REPORT
from tests import guard

TASK = Task(name="t", source_label="In", target_label="Out")
WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
PAIRS = [Pair(" ".join(WORDS[i % 9 :][: 2 + i % 4]), " ".join(WORDS[(3 * i) % 7 :][: 1 + i % 3])) for i in range(24)]
INTERPOLATIONS = {
    "constant": Interpolation(schedule="constant", lambda_max=0.5),
    "gradual": Interpolation(schedule="gradual", lambda_max=0.9),
    "rewarded": Interpolation(schedule="constant", lambda_max=0.7, length_reward=0.5),
}
"""Mixture of each adapter, by its name."""


@pytest.fixture(scope="session")
def plm(tiny_server: str) -> Iterator[RemotePlm]:
    """The PLM as the commands see it that answers are compared with."""
    with guard.remote_plm(tiny_server) as remote:
        yield remote


@pytest.fixture(scope="session")
def adapters(plm: RemotePlm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the adapters by name: one trained network with the mixtures."""
    return train_adapters(plm, tmp_path_factory.mktemp("adapters"))


def finish_reason(plm: RemotePlm, token_ids: Sequence[int]) -> str:
    """OpenAI's word for the end of an answer with these tokens."""
    stops = StopMatcher(plm.tokenizer, TASK.stops(plm.tokenizer, plm.card.eos_token_ids))
    return "stop" if stops.ends(list(token_ids)) else "length"


def train_adapters(plm: RemotePlm, root: Path) -> dict[str, Path]:
    """Folders of the adapters by name, within this one: one trained network with the mixtures."""
    build_memories(
        plm, TASK, PAIRS, root / "m", validation=PAIRS[:4], context_mode="teacher-forced", share_targets=True
    )
    settings = TrainingSettings(
        rank=16, epochs=3, batch_rows=16, learning_rate=0.02, selection_texts=0, minutes=0, retrieved_examples=0
    )
    trained, report = train(plm, root / "m", root / "trained", settings=settings)
    for name, interpolation in INTERPOLATIONS.items():
        card = trained.card.model_copy(update={"interpolation": interpolation})
        TrainedAdapter(card, trained.adapter, trained.candidate_ids_C, trained.head).save(root / name)
        (root / name / REPORT).write_text(report.model_copy(update={"card": card}).model_dump_json())
    return {name: root / name for name in INTERPOLATIONS}
