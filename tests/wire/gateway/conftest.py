"""Adapters of the tiny PLM, and a gateway that serves them to real applications."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from data_owner_client import Pair, TrainedAdapter, TrainingSettings, build_memories, train
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.plm.remote_plm import RemotePlm
from tests import guard, profiles
from tests.gateways import gateway

TASK = Task(name="t", source_label="In", target_label="Out")
WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
PAIRS = [Pair(" ".join(WORDS[i % 9 :][: 2 + i % 4]), " ".join(WORDS[(3 * i) % 7 :][: 1 + i % 3])) for i in range(24)]
INTERPOLATIONS = {
    "constant": Interpolation(schedule="constant", lambda_max=0.5),
    "gradual": Interpolation(schedule="gradual", lambda_max=0.9),
    "rewarded": Interpolation(schedule="constant", lambda_max=0.7, length_reward=0.5),
}
"""Mixture of each adapter, by its name."""
CLIENTS = Path(__file__).parents[3] / ".venv-clients" / "bin" / "python"


def finish_reason(plm: RemotePlm, token_ids: Sequence[int]) -> str:
    """OpenAI's word for the end of an answer with these tokens."""
    stops = StopMatcher(plm.tokenizer, TASK.stops(plm.tokenizer, plm.card.eos_token_ids))
    return "stop" if stops.ends(list(token_ids)) else "length"


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """Interpreter of the environment of applications."""
    if profiles.NO_CLIENTS:
        pytest.skip("PEMA_TEST_NO_CLIENTS is set")
    if not CLIENTS.exists():
        pytest.fail(f"There is no {CLIENTS}: `make .venv-clients/ready`, or set PEMA_TEST_NO_CLIENTS=1.")
    return CLIENTS


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Environment of an application that reaches nothing but this machine, with caches of its own."""
    caches = str(tmp_path_factory.mktemp("caches"))
    return {
        "PATH": os.environ["PATH"],
        "HOME": caches,
        "HF_HOME": caches,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LANGSMITH_TRACING": "false",
        "OMP_NUM_THREADS": "1",
        "OPENAI_API_KEY": "none",
        "TIKTOKEN_CACHE_DIR": caches,
    }


@pytest.fixture(scope="session")
def plm(tiny_server: str) -> Iterator[RemotePlm]:
    """The PLM as the commands see it that answers are compared with."""
    with closing(guard.connection(tiny_server)) as connection:
        yield RemotePlm(connection, dtype="float32", cache=None)


@pytest.fixture(scope="session")
def adapters(plm: RemotePlm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the adapters by name: one trained network with two mixtures."""
    root = tmp_path_factory.mktemp("adapters")
    build_memories(
        plm, TASK, PAIRS, root / "m", validation=PAIRS[:4], context_mode="teacher-forced", share_targets=True
    )
    settings = TrainingSettings(
        rank=16, epochs=3, batch_rows=16, learning_rate=0.02, selection_texts=0, minutes=0, retrieved_examples=0
    )
    trained = train(plm, root / "m", root / "trained", settings=settings)[0]
    for name, interpolation in INTERPOLATIONS.items():
        card = trained.card.model_copy(update={"interpolation": interpolation})
        TrainedAdapter(card, trained.adapter, trained.candidate_ids_C, trained.head).save(root / name)
    return {name: root / name for name in INTERPOLATIONS}


@pytest.fixture(scope="session")
def url(tiny_server: str, adapters: dict[str, Path]) -> Iterator[str]:
    """Address of a gateway of all adapters."""
    with gateway(tiny_server, adapters) as address:
        yield address


@pytest.fixture(params=INTERPOLATIONS)
def adapter_name(request: pytest.FixtureRequest) -> str:
    """The name of an adapter."""
    return str(request.param)


@pytest.fixture
def adapter(adapter_name: str, adapters: dict[str, Path]) -> TrainedAdapter:
    """The adapter of that name."""
    return TrainedAdapter.load(adapters[adapter_name])
