"""Files that are damaged, or were made to do harm: read as they were meant, or refused with a hint; never worse."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.pair_files import read_stored_pairs, write_pairs
from data_owner_client.data.pairs import Pair, digest_pairs
from data_owner_client.data.reading.reader import read_pairs
from data_owner_client.data.tasks import Task, load_task
from data_owner_client.evaluation.comparison.results import SystemResult
from data_owner_client.memory.manifest import MemoryPlan
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.plm.head_cache import CachedHead
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.training.checkpoint import Checkpoint
from plm_owner_server.cli import main
from plm_owner_server.settings import ServerSettings
from protocol.codec import Message
from protocol.messages import HeadRows, Limits, ModelCard
from tests.hostile import DEEP, crooked, damaged, one_spoilt, refused, tensors_like, text_like
from tests.profiles import scaled
from tests.unit.client.test_trained_adapter import make_trained

pytestmark = pytest.mark.unguarded("no server")

D, V, MOST_MIB = 4, 20, 256
MODEL = ModelIdentity(name="m", digest="d" * 64, cr_kind="last_hidden_state", hidden_size=D, vocab_size=V)


@pytest.fixture(scope="module", autouse=True)
def no_big_allocation() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MIB * 1024


def rows() -> MemoryRows:
    return MemoryRows(
        cr_N_D=torch.arange(5.0 * D).view(5, D).half(),
        target_N=torch.tensor([1, 2, 3, 4, 2], dtype=torch.int32),
        rows_E=torch.tensor([2, 3], dtype=torch.int32),
        source_tokens_E=torch.tensor([4, 5], dtype=torch.int32),
        logsumexp_N=torch.ones(5),
        context_N=torch.tensor([0, 1, 0, 2, 2], dtype=torch.int32),
        matches_N=torch.ones(5, dtype=torch.uint8),
        reliable_N=torch.tensor([1, 1, 1, 0, 0], dtype=torch.uint8),
    )


def test_memories(tmp_path: Path) -> None:
    plan = MemoryPlan(
        model=MODEL,
        task=Task(name="t"),
        context_mode="private",
        dtype="float16",
        with_logsumexp=True,
        data_digest=digest_pairs([Pair("a", "b")] * 2),
        examples=2,
        examples_per_shard=2,
    )
    memory = ExternalMemory.open_or_create(tmp_path, plan)
    memory.append(rows())
    memory.store_pairs([Pair("a", "b")] * 2)
    manifest, shard, pairs = (tmp_path / name for name in ("manifest.json", "shard-00000.safetensors", "pairs.jsonl"))
    good = {path: path.read_bytes() for path in (manifest, shard, pairs)}

    @given(data=st.data(), stamped=st.booleans())
    @settings(max_examples=scaled(250), database=None)
    def reads(data: st.DataObject, stamped: bool) -> None:
        path = one_spoilt(data.draw, good, [shard])
        if stamped and path == shard:  # as who means harm would
            record = json.loads(good[manifest])
            record["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
            manifest.write_text(json.dumps(record))
        read = refused(lambda: ExternalMemory(tmp_path))
        if read is None:
            return
        refused(read.pairs)
        found = refused(read.load)
        if found is not None:
            assert found.position_N().shape == found.target_N.shape
            assert found.aligned().representations_N_D().isfinite().all()
            assert found.head(1).target_N.max() < read.manifest.plan.model.vocab_size

    reads()
    # Not a file elsewhere, whatever its checksum.
    record = json.loads(good[manifest])
    record["shards"][0]["file"] = str(shard)
    manifest.write_text(json.dumps(record))
    assert refused(lambda: ExternalMemory(tmp_path)) is None


def test_adapters(tmp_path: Path) -> None:
    trained = make_trained()
    pairs = [Pair("a", "b"), Pair("c", "d")]
    card = trained.card.model_copy(update={"nearest": 1, "pairs_digest": digest_pairs(pairs)})
    TrainedAdapter(card, trained.adapter, trained.candidate_ids_C, trained.head, pairs).save(tmp_path)
    names = ("adapter.json", "adapter.safetensors", "pairs.jsonl")
    good = {tmp_path / name: (tmp_path / name).read_bytes() for name in names}
    json_file, tensors, _ = good
    cr_N_D = torch.ones(2, card.model.hidden_size)

    @given(data=st.data(), stamped=st.booleans())
    @settings(max_examples=scaled(250), database=None)
    def reads(data: st.DataObject, stamped: bool) -> None:
        path = one_spoilt(data.draw, good, [tensors])
        if stamped and path == tensors:
            record = json.loads(good[json_file])
            record["tensors_sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
            json_file.write_text(json.dumps(record))
        read = refused(lambda: TrainedAdapter.load(tmp_path))
        if read is not None:
            assert read.logprobs(cr_N_D).shape == (2, len(read.candidate_ids_C))
            assert read.card.expected_length(10) >= 1.0
            assert read.card.rank < 1000

    reads()


def test_head_caches(tmp_path: Path) -> None:
    pieces = [
        HeadRows(digest="d", vocab_size=V, weight_N_D=torch.randn(V // 2, D), bias_N=torch.randn(V // 2))
        for _ in range(2)
    ]
    whole = HeadRows(
        digest="d",
        vocab_size=V,
        weight_N_D=torch.cat([piece.weight_N_D for piece in pieces]),
        bias_N=torch.cat([piece.bias_N for piece in pieces if piece.bias_N is not None]),
    )
    limits = Limits(
        max_sequence_tokens=9, max_sequences=9, max_head_rows=V // 2, max_look_ahead=9, max_rows=9, max_body_bytes=9
    )
    head = whole.head()
    digest = hashlib.sha256()
    for part in head.parts():
        digest.update(part.numpy().tobytes())
    digest.update(head.trailer())
    card = ModelCard(
        name="m",
        digest="a" * 64,
        tokenizer_digest="b" * 64,
        cr_kind="last_hidden_state",
        hidden_size=D,
        vocab_size=V,
        dtype="float32",
        head_dtype="float32",
        head_digest=digest.hexdigest(),
        head_policy="full",
        eos_token_ids=[1],
        limits=limits,
    )
    cached = CachedHead(tmp_path, card)
    cached.fetch(lambda start, stop: pieces[start // (V // 2)])
    good = {path: path.read_bytes() for path in cached.folder.glob("rows-*")}

    @given(
        data=st.data(),
        name=st.sampled_from(["", "rows-x-1.safetensors", "rows-5-1.safetensors", "rows-0-20-.safetensors"]),
    )
    @settings(max_examples=scaled(150), database=None)
    def reads(data: st.DataObject, name: str) -> None:
        for path in cached.folder.glob("rows-*"):
            path.unlink()
        one_spoilt(data.draw, good, good)
        if name:
            (cached.folder / name).write_bytes(b"")
        found = refused(cached.load)
        if found is not None:
            assert found.logits(torch.ones(1, D)).shape == (1, V)
        refused(cached.verify)

    reads()


def test_tasks(tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    good = b'name = "t"\nstop = "x"\nformat = "chat"\n[[examples]]\nsource = "a"\ntarget = "b"\n'
    deep = b"name = " + DEEP.encode()

    @given(content=damaged(good) | st.binary(max_size=60) | st.sampled_from([deep, b"a." * 5000 + b"b = 1", b"\xff"]))
    @settings(max_examples=scaled(200), database=None)
    def reads(content: bytes) -> None:
        path.write_bytes(content)
        task = refused(lambda: load_task(path))
        assert task is None or isinstance(task, Task)

    reads()


def test_texts(tmp_path: Path) -> None:
    pairs = [Pair("a", "b"), Pair("ü", "\u2028")]
    path, kept = tmp_path / "pairs.jsonl", tmp_path / "kept.jsonl"
    write_pairs(path, pairs)
    good, digest = path.read_bytes(), digest_pairs(pairs)

    @given(
        content=damaged(good) | st.just(DEEP.encode()) | st.binary(max_size=60),
        suffix=st.sampled_from(["jsonl", "json", "tsv", "csv", "txt", "dat"]),
    )
    @settings(max_examples=scaled(200), database=None)
    def reads(content: bytes, suffix: str) -> None:
        mine = tmp_path / f"mine.{suffix}"
        mine.write_bytes(content)
        refused(lambda: read_pairs(mine))
        kept.write_bytes(content)
        stored = read_stored_pairs(kept, digest)
        assert stored is None or list(stored) == pairs

    reads()


def test_comparison_rows(tmp_path: Path) -> None:
    SystemResult(name="x", texts=["a"], ppl=2.0, details={"a": [1]}).save(tmp_path)
    path = tmp_path / "x.json"
    good = path.read_bytes()

    @given(data=st.data())
    @settings(max_examples=scaled(150), database=None)
    def reads(data: st.DataObject) -> None:
        path.write_bytes(text_like(data.draw, good))
        refused(lambda: SystemResult.load_all(tmp_path))

    reads()
    path.unlink()
    path.mkdir()
    assert refused(lambda: SystemResult.load(tmp_path, "x")) is None


def test_checkpoints(tmp_path: Path) -> None:
    """One that is not whole is none: then nothing is changed, and the training begins anew."""
    adapter = make_trained().adapter
    optimiser = torch.optim.Adam(adapter.parameters())
    sum(weight.sum() for weight in adapter.parameters()).backward()  # type: ignore[union-attr]
    optimiser.step()
    checkpoint = Checkpoint(tmp_path / "checkpoint", "training", torch.device("cpu"))
    checkpoint.save({"epoch": 1}, adapter, optimiser, adapter.state_dict(), None)
    good = checkpoint.path.read_bytes()
    (size,) = struct.unpack("<Q", good[:8])
    metadata = json.loads(good[8 : 8 + size])["__metadata__"]
    before = {name: value.clone() for name, value in adapter.state_dict().items()}

    @given(data=st.data(), stamped=st.booleans())
    @settings(max_examples=scaled(200), database=None)
    def reads(data: st.DataObject, stamped: bool) -> None:
        if stamped:
            tensors = data.draw(tensors_like(safetensors.torch.load(good)))
            told = metadata["progress"] if data.draw(st.booleans()) else data.draw(st.sampled_from(["", "{", DEEP]))
            checksum = hashlib.sha256(told.encode() + safetensors.torch.save(tensors)).hexdigest()
            content = safetensors.torch.save(tensors, metadata | {"progress": told, "sha256": checksum})
        else:
            content = data.draw(damaged(good) | crooked(good))
        checkpoint.path.write_bytes(content)
        state = torch.get_rng_state()
        found = checkpoint.load(adapter, None)
        if found is None:
            assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
            assert torch.equal(torch.get_rng_state(), state)
        torch.set_rng_state(state)
        adapter.load_state_dict(before)

    reads()


def test_server_settings(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    good = b"PEMA_PORT=9000\nPEMA_MAX_BODY_BYTES=20000\nPEMA_PREFIX_CACHE_MIB=1.5\nPEMA_STORE='sqlite:///a store.db'\n"
    values = st.sampled_from(["-1", "1e999", "nan", "inf", "9" * 5000, "", "\0", "true", DEEP])

    @given(
        content=damaged(good)
        | st.builds(
            lambda v, n: f"PEMA_{n}={v}\n".encode(),
            values,
            st.sampled_from([*map(str.upper, ServerSettings.model_fields)]),
        )
    )
    @settings(max_examples=scaled(250), database=None)
    def reads(content: bytes) -> None:
        path.write_bytes(content)
        try:
            read = ServerSettings(_env_file=path)
        except (ValidationError, UnicodeDecodeError):  # which `main` explains
            return
        assert 0 <= read.prefix_cache_mib < float("inf")
        assert 1024 <= read.max_body_bytes < 2**31

    reads()


@pytest.mark.parametrize(
    "message", [HeadRows(digest="d", vocab_size=V, weight_N_D=torch.ones(2, 3), bias_N=torch.ones(2))]
)
def test_containers_with_lying_headers(message: Message) -> None:
    good = message.to_bytes()

    @given(content=crooked(good))
    @settings(max_examples=scaled(400), database=None)
    def reads(content: bytes) -> None:
        refused(lambda: type(message).from_bytes(content))

    reads()


@pytest.mark.parametrize("content", [b"PEMA_PORT=\xff\n", b"PEMA_PORT=many\n", b"PEMA_MAX_BODY_BYTES=99999999999\n"])
def test_the_server_says_what_is_wrong_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / ".env").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pema-server", "serve"])
    with pytest.raises(SystemExit, match=r"pema-server: .*(--port|--max-body-bytes|codec).* --help"):
        main()
