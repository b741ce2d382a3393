"""A tokenizer with more tokens than the LM head has rows, and texts that spell special tokens, from build to answer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, normalizers

from data_owner_client import Pair, Task, build_memories, translate
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.store import TRAIN, ExternalMemory
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from harness.tiny_models import BOS, EOS, PAD, VOCAB_SIZE, save_model
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidData
from tests import support
from tests.unit.client.test_memory import Recorder

pytestmark = pytest.mark.unguarded("no server")

TASK = Task(name="t")
SHORT = DecodingSettings(max_new_tokens=3)
PAIRS = [Pair(f"the {i} thin", f"die {i} Tür") for i in range(8)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> PlmService:
    """The model with a token `<image>` that the head has no row for, and that is not special."""
    folder = save_model("llama", tmp_path_factory.mktemp("model") / "llama")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken("<image>", normalized=False)])
    assert tokenizer.convert_tokens_to_ids("<image>") == VOCAB_SIZE
    tokenizer.save_pretrained(folder)
    return support.make_service(folder)


@pytest.fixture
def recorder(service: PlmService) -> Recorder:
    return Recorder(service)


@pytest.fixture
def plm(recorder: Recorder) -> RemotePlm:
    return RemotePlm(recorder, dtype="float32", cache=None)


def test_the_owner_is_warned_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        support.make_service(save_model("llama", tmp_path / "llama"))
    assert "rows" not in caplog.text
    folder = save_model("llama", tmp_path / "more")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sound>"]})
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        support.make_service(folder)
    assert f"{VOCAB_SIZE} rows, and none for 1 added tokens of the tokenizer: <sound>" in caplog.text


@pytest.mark.parametrize("pair", [Pair("an <image>", "ja"), Pair("the", "a <image> here")])
def test_a_pair_with_such_a_token_is_named_before_anything_is_sent(
    plm: RemotePlm, recorder: Recorder, tmp_path: Path, pair: Pair
) -> None:
    with pytest.raises(InvalidData, match=rf"pair 6: .*'<image>'.* {VOCAB_SIZE} rows"):
        build_memories(plm, TASK, [*PAIRS[:5], pair, *PAIRS[5:]], tmp_path, validation=PAIRS[:2])
    assert not recorder.sent


def test_texts_that_spell_special_tokens_are_stored_and_come_back(plm: RemotePlm, tmp_path: Path) -> None:
    spelled = Pair("Use <bos> and <eos> tags", "Nutze <eos> und <pad><bos>")
    build_memories(plm, TASK, [spelled, *PAIRS], tmp_path, validation=PAIRS[:2])
    stored = ExternalMemory(tmp_path / TRAIN).load()
    assert not {PAD, BOS, EOS} & {*stored.target_N.tolist()}
    first = stored.target_N[: stored.rows_E[0]].tolist()
    assert plm.tokenizer.decode_continuation(first) == f" {spelled.target}\n"


class Lines(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def test_targets_that_the_tokenizer_changes_are_said_once(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "llama")
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    plm = RemotePlm(Recorder(support.make_service(folder)), dtype="float32", cache=None)
    lines = Lines()
    build_memories(plm, TASK, PAIRS, tmp_path / "memory", validation=PAIRS[:2], reporter=lines)
    (line,) = (line for line in lines.said if "changes" in line)
    assert "changes 10 of 10 targets" in line
    assert "'die 0 Tür' becomes 'die 0 tür'" in line


def test_such_a_text_is_named_and_the_others_are_answered(plm: RemotePlm, recorder: Recorder) -> None:
    with pytest.raises(InvalidData, match=r"text 2: .*'<image>'"):
        translate(plm, ["the thin", "an <image>"], task=TASK)
    assert not recorder.sent
    failures = dict[int, str]()
    answers = translate(
        plm,
        ["the thin", "an <image>"],
        task=TASK,
        decoding=SHORT,
        on_failure=lambda index, error: failures.update({index: str(error)}),
    )
    assert "<image>" in failures.pop(1)
    assert not failures
    assert answers.texts[0] == translate(plm, ["the thin"], task=TASK, decoding=SHORT).texts[0]
