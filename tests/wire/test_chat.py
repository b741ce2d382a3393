"""The main job as a conversation, over both transports: named templates, the end of a turn, and the day."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_owner_client import Pair, Task, TrainingSettings, build_memories, train, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory import build
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import EOS, PAD, save_model
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import ConnectionFailed
from protocol.messages import DecodeRequest, DecodeResponse, EncodeRequest, EncodeResponse
from tests import support
from tests.chat_templates import NOVEMBER

DECEMBER = datetime.date(2026, 12, 24)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ pad_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {"default": PLAIN, "dated": "{{ strftime_now('%d %B %Y') }}\n" + PLAIN}
PAIRS = [Pair(f"the thin {number}", "an") for number in range(12)]
CHAT = Task(name="t", format="chat")
DATED = Task(name="t", format="chat", template="dated")


class Day(datetime.date):
    """The day that the client's machine shows."""

    shown = NOVEMBER

    @classmethod
    def today(cls) -> datetime.date:  # type: ignore[override]
        return cls.shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "chat", chat_template=TEMPLATES)


@pytest.fixture(scope="module")
def service(folder: Path) -> PlmService:
    return support.make_service(folder)


@pytest.fixture(params=["rest", "grpc"])
def connection(request: pytest.FixtureRequest, service: PlmService) -> Iterator[Connection]:
    with support.connection_over(request.param, service) as connection:
        yield connection


@pytest.fixture
def plm(connection: Connection, tmp_path: Path) -> RemotePlm:
    return RemotePlm(connection, dtype="float32", cache=tmp_path / "cache")


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> type[Day]:
    monkeypatch.setattr(f"{build_memories.__module__}.date", Day)
    monkeypatch.setattr(Day, "shown", NOVEMBER)
    return Day


def build_memory(plm: RemotePlm, task: Task, folder: Path) -> ExternalMemory:
    build_memories(plm, task, PAIRS, folder, validation=PAIRS[:3], context_mode="teacher-forced", share_targets=True)
    return ExternalMemory(folder / TRAIN)


def test_named_templates_reach_the_client(plm: RemotePlm, folder: Path) -> None:
    assert plm.tokenizer.chat_templates == TEMPLATES == AutoTokenizer.from_pretrained(folder).chat_template
    # From the cache, too.
    cached = RemotePlm(plm._connection, cache=plm._cache)
    assert cached.tokenizer.chat_templates == TEMPLATES


def test_an_adapter_learns_the_end_of_a_turn(plm: RemotePlm, tmp_path: Path) -> None:
    memory = build_memory(plm, CHAT, tmp_path)
    rows = memory.load()
    ends = [ids_T[-1].item() for ids_T in rows.target_N.split(rows.rows_E.tolist())]
    assert ends == [PAD] * len(PAIRS)
    settings = TrainingSettings(
        rank=8, epochs=100, batch_rows=8, learning_rate=0.02, retrieved_examples=0, selection_texts=0, minutes=0
    )
    adapter = train(plm, tmp_path, tmp_path / "adapter", settings=settings)[0]
    decoding = DecodingSettings(max_new_tokens=30, length_bound=False, repetition_bound=False)
    certain = Interpolation(schedule="constant", lambda_max=0.999)
    answer = translate(plm, ["the thin"], adapter=adapter, interpolation=certain, decoding=decoding)
    assert answer.texts == ["an"]
    assert answer.token_ids[0][-1] == PAD != EOS


def test_the_day_of_a_memory_stays(
    plm: RemotePlm, connection: Connection, tmp_path: Path, today: type[Day], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_EXAMPLES_PER_SHARD", 4)
    undisturbed = build_memory(plm, DATED, tmp_path / "undisturbed")

    def cut(request: EncodeRequest) -> EncodeResponse:
        raise ConnectionFailed("cut")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "encode", cut)
        with pytest.raises(ConnectionFailed):
            build_memory(plm, DATED, tmp_path / "cut")
    today.shown = DECEMBER
    resumed = build_memory(plm, DATED, tmp_path / "cut")
    assert resumed.manifest.plan.task.date == NOVEMBER
    assert resumed.digest == undisturbed.digest
    assert build_memory(plm, DATED, tmp_path / "new").manifest.plan.task.date == DECEMBER
    assert build_memory(plm, CHAT, tmp_path / "timeless").manifest.plan.task.date is None

    settings = TrainingSettings(rank=4, epochs=1, retrieved_examples=0, selection_texts=0, minutes=0)
    adapter = train(plm, tmp_path / "cut", tmp_path / "adapter", settings=settings)[0]
    assert adapter.card.task.date == NOVEMBER
    sent: list[DecodeRequest] = []
    decode = connection.decode

    def record(request: DecodeRequest) -> DecodeResponse:
        sent.append(request)
        return decode(request)

    monkeypatch.setattr(connection, "decode", record)
    for task in (None, DATED):  # the adapter's, and the same from its file
        translate(plm, ["the"], adapter=adapter, task=task, decoding=DecodingSettings(max_new_tokens=2))
    assert sent
    assert all("27 November 2026" in plm.tokenizer.decode(request.token_ids[0]) for request in sent)
