"""The engine over vLLM against transformers, architecture by architecture, and what becomes of it when it is killed.

Only with `--engine vllm` (`make test-vllm`).
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from data_owner_client import connect, load_task, read_pairs
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.plm.connection.open import open_connection
from harness.datasets import home_assistant
from harness.tiny_models import ARCHITECTURES, EOS, WINDOWED, TinyModels
from plm_owner_server.engines.interface import DraftBatch, EncodeBatch, Engine
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.engines.vllm.engine import GenerationEngine
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.operations.supervisor import Supervisor
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.settings import DEFAULT_MODEL
from protocol.errors import NotReady, PemaError, Unsupported
from protocol.messages import EncodeRequest
from tests import support
from tests.drafting import drafted
from tests.support import random_ids

pytestmark = pytest.mark.vllm

until = partial(support.until, within_s=600)
IDS = random_ids(1, [70, 33, 1, 100, 64], shared=40)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engines(request: pytest.FixtureRequest, tiny_models: TinyModels) -> tuple[Engine, Engine]:
    folder = tiny_models[request.param]
    ours = load_engine(folder, support.make_settings(device="cpu", dtype="float32", prefix_cache_mib=64))
    model = load_model(folder, device="cpu", dtype="float32")
    theirs = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0)
    theirs.warm_up()
    return ours, theirs


@pytest.fixture
def rounding(request: pytest.FixtureRequest) -> float:
    """Tolerance of an architecture's tiny model: the norms of these two amplify more."""
    return 5.0 if request.node.callspec.params["engines"] in ("gemma2", "gemma3") else 1.0


def assert_close(ours: torch.Tensor | None, theirs: torch.Tensor | None, rounding: float) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * rounding * theirs.abs().max().item())


def test_every_position_is_that_of_transformers(engines: tuple[Engine, Engine], rounding: float) -> None:
    """From the first position, from behind the cached prefix, and from within it."""
    ours, theirs = engines
    assert ours.info == theirs.info
    for starts in ([0, 0, 0, 99, 0], [40, 32, 0, 60, 63], [5, 32, 0, 0, 31], [0] * 5):
        batch = EncodeBatch(IDS, starts, with_logsumexp=True, tenant="acme")
        expected, result = theirs.encode(batch), ours.encode(batch)
        assert (result.rows, result.echo) == (expected.rows, expected.echo)
        assert_close(result.cr_N_D, expected.cr_N_D, rounding)
        assert_close(result.logsumexp_N, expected.logsumexp_N, rounding)
    assert ours.stats.cached_tokens > 0


def test_tenants_share_no_cached_states(engines: tuple[Engine, Engine]) -> None:
    ours, _ = engines
    cached = []
    for tenant in ("first", "second", "first"):
        before = ours.stats.cached_tokens
        ours.encode(EncodeBatch(IDS[3:4], [99], tenant=tenant))
        cached.append(ours.stats.cached_tokens - before)
    assert cached == [0, 0, 99]


def test_cached_states_can_be_removed(engines: tuple[Engine, Engine]) -> None:
    ours, _ = engines
    assert isinstance(ours, GenerationEngine)
    batch = EncodeBatch(IDS[3:4], [99], tenant="forgetful")
    ours.encode(batch)
    ours._runner._cached_since = -math.inf
    ours.evict_idle()
    assert ours._runner._cached_since is None
    before = ours.stats.cached_tokens
    ours.encode(batch)
    assert ours.stats.cached_tokens == before
    ours.encode(batch)
    assert ours.stats.cached_tokens > before


def test_drafts_are_those_of_transformers(engines: tuple[Engine, Engine], rounding: float) -> None:
    batch = DraftBatch(IDS, [69, 30, 0, 99, 63], [20, 9, 30, 15, 0], frozenset([EOS]), "acme")
    ours, theirs = (drafted(engine, [batch])[0] for engine in engines)
    assert (ours.rows, ours.echo) == (theirs.rows, theirs.echo)
    assert ours.top1_N.tolist() == theirs.top1_N.tolist()
    assert_close(ours.cr_N_D, theirs.cr_N_D, rounding)
    for name in ("logsumexp_N", "top1_logprob_N"):  # in nats
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-4 * rounding)


def test_rounds_run_only_the_tokens_that_are_new(
    engines: tuple[Engine, Engine], rounding: float, request: pytest.FixtureRequest
) -> None:
    """Clients accept some drafts, replace the next one, and go on; two texts begin alike."""
    ours, theirs = engines
    # Their windows are shorter than a block here, and vLLM keeps no block that has left the window.
    keeps_blocks = request.node.callspec.params["engines"] not in WINDOWED
    first, second = [*IDS[0]], [*IDS[0][:50], *IDS[4][50:58]]
    for accepted in (20, 3, 0, 7):
        before = ours.stats.cached_tokens
        batch = DraftBatch([first, second], [len(first) - 1, len(second) - 1], [20, 4], tenant="rounds")
        decoded = [drafted(engine, [batch])[0] for engine in (ours, theirs)]
        assert_close(decoded[0].cr_N_D, decoded[1].cr_N_D, 3 * rounding)  # states of several rounds add up
        assert decoded[0].top1_N.tolist() == decoded[1].top1_N.tolist()
        if accepted != 20 and keeps_blocks:
            assert ours.stats.cached_tokens - before == len(first) - 1 + len(second) - 1
        tokens = decoded[1].top1_N.tolist()
        first = [*first, *tokens[:accepted], (tokens[accepted] + 1) % ours.info.vocab_size]
        second = [*second, *tokens[21:]]


def test_what_vllm_gets_wrong_on_a_cpu_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models["gemma2"], tmp_path / "capped")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"attn_logit_softcapping": 50.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Unsupported, match="soft-capped"):
        load_engine(folder, support.make_settings(device="cpu", dtype="float32"))


@pytest.mark.real_models
def test_the_default_model_says_the_same_on_the_demos_test_set(tmp_path: Path) -> None:
    """Token for token, as far as an answer goes."""
    folder = resolve(DEFAULT_MODEL, support.make_settings().cache_dir).folder
    home_assistant.prepare(tmp_path)
    task, pairs = load_task(tmp_path / "task.toml"), read_pairs(tmp_path / "test.jsonl")
    said: dict[str, list[list[int]]] = {"transformers": [], "vllm": []}
    for name, answers in said.items():
        service = support.make_service(folder, shared=False, engine=name, vllm_options={}, max_sequence_tokens=1024)
        with support.serve(service) as url, connect(url, dtype="float32") as plm:
            prompts = [tokenize_pair(plm, task, pair).prompt for pair in pairs]
            for start in range(0, len(prompts), 40):
                some = prompts[start : start + 40]
                response = plm.decode(some, [48] * len(some), sorted(plm.tokenizer.ids_containing("\n")))
                answers += [ids.tolist() for ids in response.top1_N.split(response.rows_B.tolist())]
    assert len(said["vllm"]) == 200
    assert said["vllm"] == said["transformers"]


@pytest.mark.parametrize("transport", ["rest", "grpc", None])
def test_vllm_that_is_killed_is_a_503_and_the_end(tiny_models: TinyModels, transport: str | None) -> None:
    """With a call over either transport, or without any call."""
    request, gave_up = EncodeRequest(token_ids=[[5, 6]], from_position=[0]), list[PemaError]()

    def load() -> PlmService:
        return support.make_service(tiny_models["llama"], shared=False)

    before = set(psutil.Process().children())
    state = ServingState()
    supervisor = Supervisor(load, state, engine_timeout_s=600, give_up=gave_up.append)
    threading.Thread(target=supervisor.run, daemon=True).start()
    serve = support.serve_state_over_grpc if transport == "grpc" else support.serve_state
    with serve(state, max_body_bytes=2**20) as url:
        until(lambda: state.is_ready)
        connection = open_connection(url, retry_for=0)
        assert len(connection.encode(request).cr_N_D) == 2
        (core,) = [child for child in set(psutil.Process().children()) - before if child.children()]
        core.kill()
        if transport is not None:
            with pytest.raises(NotReady) as caught:
                connection.encode(request)
            assert caught.value.retry_after_s
        until(lambda: not state.is_ready)
        until(lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE)
        connection.close()
    until(lambda: len(gave_up) == 1)
    assert str(gave_up[0]).startswith(("The engine has died", "The engine has failed its check"))
