"""A translation among faults, with the real processes: the file that comes out is the same, line for line."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_owner_client import DecodingSettings, connect
from data_owner_client.data.stops import Stops
from data_owner_client.decoding.decode_loop import GenerationConfig, GenerationRequest, generate
from harness.tcp_proxy import Fault, faulty_proxy
from harness.tiny_models import EOS, VOCAB_SIZE, TinyModels
from tests import guard
from tests.command_line import WORDS, write_pairs
from tests.processes.parties import Owner, client_command, client_json, end, owner_that_can_be_killed

LINES = 60
IMPATIENT = ["--timeout", "1.5", "--retry-for", "120", "--max-new-tokens", "24"]
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """A server, an adapter, texts, and what becomes of them undisturbed."""

    owner: Owner
    adapter: Path
    texts: Path
    expected: bytes

    def start(self, url: str, output: Path, *flags: str) -> subprocess.Popen[str]:
        what = ["--adapter", self.adapter, "--input", self.texts, "--output", output, *IMPATIENT, *flags]
        command = client_command(url, "translate", *what)
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.fixture(scope="module")
def setting(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("decode")
    flags = ["--model", str(tiny_models["llama"]), "--prefix-cache-mib", "1"]
    with owner_that_can_be_killed(folder / "log", *flags) as owner:
        (folder / "task.toml").write_text('name = "tiny"\nsource_label = "In"\ntarget_label = "Out"\n')
        pairs, url = write_pairs(folder / "pairs.jsonl", 60, seed=1), owner.url("http")
        built = ["--task", folder / "task.toml", "--input", pairs, "--memory", folder / "memory", "--share-targets"]
        client_json(url, "build-memory", *built)
        trained = ["--memory", folder / "memory", "--adapter", folder / "adapter", "--epochs", 3, "--rank", 8]
        trained += ["--retrieved-examples", 0, "--selection-texts", 0, "--minutes", 0]
        client_json(url, "train", *trained)
        rng = random.Random(3)
        texts = folder / "texts.txt"
        texts.write_text("".join(f"{' '.join(rng.choices(WORDS, k=4))} {i}\n" for i in range(LINES)))
        undisturbed = folder / "undisturbed.txt"
        setting = Setting(owner, folder / "adapter", texts, b"")
        assert end(setting.start(url, undisturbed, "--look-ahead", "0")) == 0
        expected = undisturbed.read_bytes()
        assert len(set(expected.splitlines())) > LINES / 4
        yield Setting(owner, folder / "adapter", texts, expected)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("kind", ["cut", "stall", "garble", "garble-request"])
def test_one_fault_of_each_kind(setting: Setting, tmp_path: Path, scheme: str, kind: str) -> None:
    output, struck = tmp_path / "output.txt", threading.Event()
    with faulty_proxy(setting.owner.port(scheme), [Fault(kind, 20_000, then=struck.set)]) as port:  # type: ignore[arg-type]
        assert end(setting.start(guard.url(scheme, port), output)) == 0
    assert struck.is_set()
    assert output.read_bytes() == setting.expected


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_is_killed_and_comes_back_changes_nothing(setting: Setting, tmp_path: Path, scheme: str) -> None:
    output, owner = tmp_path / "output.txt", setting.owner
    before = owner.restarts
    kills = [Fault("cut", after, then=owner.restart) for after in (20_000, 10_000)]
    with faulty_proxy(owner.port(scheme), kills) as port:
        process = setting.start(guard.url(scheme, port), output, "--batch-size", "7")
        assert end(process, within_s=300) == 0
    assert owner.restarts - before == len(kills)
    assert output.read_bytes() == setting.expected


def test_the_servers_memory_is_flat_through_random_traffic(setting: Setting) -> None:
    """The cache turns over many times within its bound of 1 MiB: as many tokens as hours of work would bring."""
    rng, process = random.Random(5), psutil.Process(setting.owner.process.pid)
    resident: list[int] = []
    with connect(setting.owner.url("grpc"), **guard.credentials(dtype="float16")) as plm:
        for _ in range(6):
            for _ in range(25):
                prompts = [rng.choices(range(3, VOCAB_SIZE), k=rng.randint(2, 60)) for _ in range(32)]
                requests = [GenerationRequest(prompt) for prompt in prompts]
                settings = DecodingSettings(
                    max_new_tokens=rng.randint(1, 20), batch_size=rng.choice([1, 7, 32]) if rng.random() < 0.1 else 32
                )
                generate(plm, requests, GenerationConfig(stops=Stops(ids=frozenset([EOS])), settings=settings))
            resident.append(process.memory_info().rss)
    # What comes first fills the cache and the allocator.
    assert resident[-1] - resident[1] < 32 * MIB, [size // MIB for size in resident]
