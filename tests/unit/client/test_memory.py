"""The memory on disk, and how it is built: resumption, damage, privacy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_owner_client.data.pairs import Pair
from data_owner_client.data.stops import StopMatcher
from data_owner_client.data.tasks import Task
from data_owner_client.memory import build
from data_owner_client.memory import request_batches as planning
from data_owner_client.memory.build import build_memory
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import TinyModels
from plm_owner_server.service.plm_service import PlmService
from protocol.codec import load_tensors
from protocol.errors import ConnectionFailed, IdentityMismatch, InvalidData, ProtocolViolation
from protocol.messages import DTYPES, DecodeRequest, EncodeRequest
from protocol.types import WireDtype
from tests import support

TASK = Task(name="t", source_label="In", target_label="Out", examples=({"source": "an", "target": "on"},))
PAIRS = [Pair(f"the {i} thin", f"die {i} Tür{'en' * (i % 4)}") for i in range(11)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_EXAMPLES_PER_SHARD", 4)
    monkeypatch.setattr(planning, "EXAMPLES_PER_REQUEST", 3)


class Recorder:
    """A connection that keeps what was sent, and can break or tamper."""

    def __init__(self, service: PlmService) -> None:
        self._connection = InProcessConnection(service)
        self.sent: list[Any] = []
        self.fail_after = 10**9
        self.tamper: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._connection, name)
        if not callable(call):
            return call

        def recorded(*request: Any) -> Any:
            if request:
                self.sent.append(request[0])
                if len(self.sent) > self.fail_after:
                    raise ConnectionFailed("cut")
            answer = call(*request)
            return answer.model_copy(update=self.tamper) if request else answer

        return recorded


@pytest.fixture
def recorder(tiny_service: PlmService) -> Recorder:
    return Recorder(tiny_service)


@pytest.fixture
def plm(recorder: Recorder) -> RemotePlm:
    return RemotePlm(recorder, dtype="float32", cache=None)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def build_teacher_forced(plm: RemotePlm, folder: Path, **options: Any) -> ExternalMemory:
    return build_memory(plm, TASK, PAIRS, folder, context_mode="teacher-forced", share_targets=True, **options)


@pytest.mark.parametrize("context_mode", ["private", "teacher-forced"])
def test_rows_are_labelled_with_their_targets(plm: RemotePlm, tmp_path: Path, context_mode: Any) -> None:
    memory = build_memory(plm, TASK, PAIRS, tmp_path, context_mode=context_mode, share_targets=True)
    rows = memory.load()
    targets = [part.tolist() for part in rows.target_N.split(rows.rows_E.tolist())]
    stops = StopMatcher(plm.tokenizer, TASK.stops(plm.tokenizer, plm.card.eos_token_ids))
    texts = [stops.text(ids).strip() for ids in targets]
    assert texts == [pair.target for pair in PAIRS]
    assert all(stops.end(ids) == len(ids) - 1 for ids in targets)
    assert rows.source_tokens_E.tolist() == [plm.tokenizer.count(pair.source) for pair in PAIRS]
    assert rows.position_N().tolist() == [i for ids in targets for i in range(len(ids))]
    assert rows.cr_N_D.shape == (len(rows.target_N), plm.card.hidden_size)
    assert memory.length_ratio == pytest.approx(len(rows.target_N) / rows.source_tokens_E.sum().item())
    assert memory.complete


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 1 / 127), ("float16", 2**-10), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("cr_kind", ["last_hidden_state", "ffn_output"])
def test_compact_rows_are_close_to_the_exact_ones(
    tiny_models: TinyModels, tmp_path: Path, dtype: WireDtype, tolerance: float, cr_kind: Any
) -> None:
    service = support.make_service(tiny_models["qwen3"], cr_kind=cr_kind)
    exact = build_teacher_forced(
        RemotePlm(InProcessConnection(service), dtype="float32", cache=None), tmp_path / "exact"
    ).load()
    memory = build_teacher_forced(
        RemotePlm(InProcessConnection(service), dtype=dtype, cache=None), tmp_path / "compact"
    )
    assert memory.manifest.plan.dtype == dtype
    rows = memory.load()
    assert rows.cr_N_D.dtype == DTYPES[dtype]
    for ours_N_D, exact_N_D in (
        (rows.representations_N_D(), exact.representations_N_D()),
        (rows.head_input_N_D(), exact.head_input_N_D()),
    ):
        bound_N_1 = tolerance * exact_N_D.abs().amax(dim=1, keepdim=True)
        assert ((ours_N_D.float() - exact_N_D).abs() <= bound_N_1).all()


@pytest.mark.parametrize("cut", range(5))
def test_an_interrupted_build_goes_on_and_ends_in_the_same_files(
    plm: RemotePlm, recorder: Recorder, tiny_service: PlmService, tmp_path: Path, cut: int
) -> None:
    build_teacher_forced(plm, tmp_path / "undisturbed")
    recorder.sent.clear()
    recorder.fail_after = cut
    with pytest.raises(ConnectionFailed):
        build_teacher_forced(plm, tmp_path / "cut")
    stored = ExternalMemory(tmp_path / "cut").manifest.examples
    assert stored < len(PAIRS)
    # What a kill leaves behind: half-written files, and a shard that the manifest does not name yet.
    (tmp_path / "cut" / ".shard-00001.safetensors.99.partial").write_bytes(b"half")
    # Calls of the cut build may still be in flight, so the next one has a connection of its own.
    again = Recorder(tiny_service)
    build_teacher_forced(RemotePlm(again, dtype="float32", cache=None), tmp_path / "cut")
    assert sum(len(request.token_ids) for request in again.sent) == len(PAIRS) - stored
    finished = files(tmp_path / "cut")
    finished.pop(".shard-00001.safetensors.99.partial", None)
    assert finished == files(tmp_path / "undisturbed")


def test_a_finished_build_asks_for_nothing(plm: RemotePlm, recorder: Recorder, tmp_path: Path) -> None:
    build_teacher_forced(plm, tmp_path)
    recorder.sent.clear()
    build_teacher_forced(plm, tmp_path)
    assert recorder.sent == []
    build_teacher_forced(plm, tmp_path, overwrite=True)
    assert recorder.sent


def test_targets_are_shared_only_when_allowed(plm: RemotePlm, recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"shows? every target|--share-targets"):
        build_memory(plm, TASK, PAIRS, tmp_path / "a", context_mode="teacher-forced")
    assert recorder.sent == []
    build_memory(plm, TASK, PAIRS, tmp_path / "b", context_mode="private")
    prompts = [plm.tokenizer.encode_prompt(TASK.prompt(pair.source, plm.tokenizer)) for pair in PAIRS]
    assert all(isinstance(request, DecodeRequest) for request in recorder.sent)
    assert [ids for request in recorder.sent for ids in request.token_ids] == prompts
    recorder.sent.clear()
    build_teacher_forced(plm, tmp_path / "c")
    assert all(isinstance(request, EncodeRequest) for request in recorder.sent)


@pytest.mark.parametrize("change", ["pairs", "task", "dtype", "mode"])
def test_another_memory_in_the_folder_is_refused(
    plm: RemotePlm, recorder: Recorder, tmp_path: Path, change: str
) -> None:
    build_teacher_forced(plm, tmp_path)
    before = files(tmp_path)
    pairs = PAIRS[:-1] if change == "pairs" else PAIRS
    task = TASK.model_copy(update={"source_label": "x"}) if change == "task" else TASK
    other = RemotePlm(recorder, dtype="float16", cache=None) if change == "dtype" else plm
    mode: Any = "private" if change == "mode" else "teacher-forced"
    with pytest.raises(InvalidData, match="another"):
        build_memory(other, task, pairs, tmp_path, context_mode=mode, share_targets=True)
    assert files(tmp_path) == before


def test_a_memory_of_another_model_is_refused_by_name(plm: RemotePlm, tiny_models: TinyModels, tmp_path: Path) -> None:
    build_teacher_forced(plm, tmp_path)
    other = RemotePlm(InProcessConnection(support.make_service(tiny_models["qwen2"])), dtype="float32", cache=None)
    with pytest.raises(IdentityMismatch, match=r"llama .* qwen2"):
        build_teacher_forced(other, tmp_path)


def test_two_builders_do_not_mix(plm: RemotePlm, tmp_path: Path) -> None:
    with build._exclusive_build(tmp_path), pytest.raises(InvalidData, match="Another build-memory"):
        build_teacher_forced(plm, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_is_noticed(plm: RemotePlm, tmp_path: Path, damage: str) -> None:
    memory = build_teacher_forced(plm, tmp_path)
    path = tmp_path / memory.manifest.shards[1].file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(InvalidData, match=r"shard-00001\.safetensors is damaged"):
        memory.load()


def test_unfinished_missing_and_damaged_memories_say_what_to_do(
    plm: RemotePlm, recorder: Recorder, tmp_path: Path
) -> None:
    with pytest.raises(InvalidData, match="holds no memory"):
        ExternalMemory(tmp_path)
    recorder.fail_after = 3
    with pytest.raises(ConnectionFailed):
        build_teacher_forced(plm, tmp_path)
    with pytest.raises(InvalidData, match=r"4 of 11 examples.*Run the same"):
        ExternalMemory(tmp_path).load()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"format": "pema-memory-9"}))
    with pytest.raises(InvalidData, match="damaged or of another version"):
        ExternalMemory(tmp_path)


def test_unusable_pairs_are_found_before_anything_is_sent(plm: RemotePlm, recorder: Recorder, tmp_path: Path) -> None:
    for bad, message in (
        (Pair("x", "two\nlines"), "pair 12: .* contains the stop"),
        (Pair("x"), "pair 12 has no target"),
        (Pair("x" * 500, "y"), "pair 12 has more than .* tokens"),
    ):
        with pytest.raises(InvalidData, match=message):
            build_memory(plm, TASK, [*PAIRS, bad], tmp_path)
    assert recorder.sent == []


@pytest.mark.parametrize(
    ("tamper", "error"),
    [
        ({"echo": [1, 2, 3]}, ProtocolViolation),
        ({"digest": "other"}, IdentityMismatch),
        ({"rows_B": torch.tensor([1, 1, 1])}, ProtocolViolation),
        ({"cr_N_D": torch.full((1, 32), 0.0)}, ProtocolViolation),
        ({"cr_N_D": torch.full((1, 32), float("nan"))}, ProtocolViolation),
        ({"last_hidden_N_D": torch.full((1, 32), 0.0)}, ProtocolViolation),
    ],
)
def test_answers_are_checked_before_they_are_stored(
    plm: RemotePlm, recorder: Recorder, tmp_path: Path, tamper: dict[str, Any], error: type[Exception]
) -> None:
    recorder.tamper = tamper
    with pytest.raises(error):
        build_teacher_forced(plm, tmp_path)
    assert ExternalMemory(tmp_path).manifest.rows == 0


def test_private_requests_tell_of_targets_only_how_long_they_are(
    plm: RemotePlm, recorder: Recorder, tmp_path: Path
) -> None:
    """Other targets of as many tokens, and with the same tokens in all, are asked about in the very same words."""
    targets = ["q x z", "z q x", "j v", "v j", "w"]  # single letters, which this tokenizer never joins
    requests = []
    for name, order in (("one", [0, 1, 2, 3, 4]), ("other", [1, 0, 3, 2, 4])):
        pairs = [Pair(f"the {i} thin", targets[at]) for i, at in enumerate(order)]
        del recorder.sent[:]
        build_memory(plm, TASK, pairs, tmp_path / name, held_out=True)
        # Calls in flight at the same time reach the server in any order.
        requests.append(sorted(request.to_bytes() for request in recorder.sent))
    assert requests[0] == requests[1]
    memories = [ExternalMemory(tmp_path / name).load() for name in ("one", "other")]
    assert memories[0].target_N.tolist() != memories[1].target_N.tolist()
    # The server may compute them in other batches, which round otherwise.
    torch.testing.assert_close(memories[0].cr_N_D, memories[1].cr_N_D, atol=1e-4, rtol=1e-4)


def test_private_answers_are_as_long_as_the_targets(plm: RemotePlm, recorder: Recorder, tmp_path: Path) -> None:
    recorder.tamper = {"rows_B": torch.ones(3, dtype=torch.long)}
    with pytest.raises(ProtocolViolation):
        build_memory(plm, TASK, PAIRS, tmp_path)
    assert ExternalMemory(tmp_path).manifest.rows == 0


def test_a_memory_folder_that_cannot_be_is_explained(plm: RemotePlm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidData, match="cannot be written to"):
        build_teacher_forced(plm, tmp_path / "file")
    with pytest.raises(InvalidData, match="cannot be"):
        build_teacher_forced(plm, tmp_path / "file" / "below")


def test_requests_stay_within_the_servers_limits(tiny_models: TinyModels, tmp_path: Path) -> None:
    service = support.make_service(
        tiny_models["llama"], max_sequences=2, max_answer_bytes=40 * 32 * 4, max_body_bytes=1024
    )
    recorder = Recorder(service)
    with RemotePlm(recorder, dtype="float32", cache=None) as plm:
        rows = build_teacher_forced(plm, tmp_path).load()
    assert len(rows.rows_E) == len(PAIRS)
    assert max(len(request.token_ids) for request in recorder.sent) <= 2
    assert max(len(request.to_bytes()) for request in recorder.sent) <= 1024


def test_rows_of_another_kind_keep_the_heads_input_beside_them(tiny_models: TinyModels, tmp_path: Path) -> None:
    ffn = RemotePlm(
        InProcessConnection(support.make_service(tiny_models["llama"], cr_kind="ffn_output")),
        dtype="float32",
        cache=None,
    )
    plain = RemotePlm(InProcessConnection(support.make_service(tiny_models["llama"])), dtype="float32", cache=None)
    rows = build_teacher_forced(ffn, tmp_path / "ffn").load()
    expected = build_teacher_forced(plain, tmp_path / "plain").load()
    assert rows.last_hidden_N_D is not None
    torch.testing.assert_close(rows.head_input_N_D(), expected.cr_N_D)
    assert not torch.allclose(rows.cr_N_D, expected.cr_N_D)


def test_concatenation_drops_a_column_that_not_all_parts_have() -> None:
    part = MemoryRows(torch.zeros(1, 2), torch.zeros(1), torch.ones(1), torch.ones(1), logsumexp_N=torch.zeros(1))
    bare = MemoryRows(torch.zeros(1, 2), torch.zeros(1), torch.ones(1), torch.ones(1))
    assert MemoryRows.concatenate([part, bare]).logsumexp_N is None
    assert MemoryRows.concatenate([part, part]).logsumexp_N is not None


def test_shards_keep_the_column_names_of_their_format(plm: RemotePlm, tmp_path: Path) -> None:
    memory = build_memory(plm, TASK, PAIRS[:2], tmp_path)
    columns = load_tensors((tmp_path / memory.manifest.shards[0].file).read_bytes())
    assert {"cr_N_D", "target_N", "rows_E", "source_tokens_E", "context_N", "agrees_N", "sure_N"} <= columns.keys()
    rows = memory.load()
    assert rows.matches_N is not None
    assert torch.equal(rows.matches_N, columns["agrees_N"])
    assert rows.reliable_N is not None
    assert torch.equal(rows.reliable_N, columns["sure_N"])
