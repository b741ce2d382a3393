"""Rows of vLLM where texts share passes in other ways: pieces of prompts, preemption, ranks, stages, asynchronously.

Only with `--engine vllm` (`make test-vllm`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.tiny_models import EOS, TinyModels
from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch, Encoded, Engine
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.engines.vllm.async_llm import VllmModel
from plm_owner_server.engines.vllm.engine import GenerationEngine
from tests import support
from tests.drafting import drafted, run_to_end
from tests.support import random_ids

pytestmark = pytest.mark.vllm

until = partial(support.until, within_s=600)
# Keys and values of 3 layers, 2 heads of 32 values each, 32 tokens, 4 bytes.
_BLOCK_BYTES = 3 * 2 * 2 * 32 * 32 * 4
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "prompts in pieces": {"max_batch_tokens": 40, "vllm_options": {"max_num_seqs": 16}},
    # The texts of `PROMPTS` need 30 blocks with their drafts.
    "preemption": {"vllm_options": {"kv_cache_memory_bytes": 12 * _BLOCK_BYTES}},
    "two tensor-parallel ranks": {"tensor_parallel_size": 2},
    # vLLM makes the tensors between stages when it warms up, which it leaves out on an eager CPU.
    "two pipeline stages": {"pipeline_parallel_size": 2, "vllm_options": {"enforce_eager": False}},
}
PROMPTS = random_ids(1, [70, 33, 1, 80, 64, 50, 61, 30, 90, 47], shared=33)
DRAFTS = [[20, 30], [9, 40], [30, 48], [15, 60], [0, 50]]


@pytest.fixture(scope="module")
def truth(tiny_models: TinyModels) -> Engine:
    model = load_model(tiny_models["llama"], device="cpu", dtype="float32")
    return TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0)


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Iterator[GenerationEngine]:
    settings = dict(CONFIGURATIONS[request.param])
    common = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}
    options = common | settings.pop("vllm_options", {})
    chosen = support.make_settings(device="cpu", dtype="float32", vllm_options=options, **settings)
    engine = load_engine(tiny_models["llama"], chosen)
    assert isinstance(engine, GenerationEngine)
    yield engine
    model = vllm_model(engine)
    until(lambda: not model._llm.output_processor.has_unfinished_requests())


def vllm_model(engine: GenerationEngine) -> VllmModel:
    model = engine._runner._model
    assert isinstance(model, VllmModel)
    return model


def draft_batches(stop: frozenset[int] = frozenset([EOS])) -> list[DraftBatch]:
    """Five batches of two, with one position or several before the drafts, as a client's own drafts are checked."""
    pairs = [PROMPTS[i : i + 2] for i in range(0, len(PROMPTS), 2)]
    return [
        DraftBatch(pair, [max(0, len(ids) - 1 - 4 * (i % 2)) for ids in pair], drafts, stop, f"tenant {i % 2}")
        for i, (pair, drafts) in enumerate(zip(pairs, DRAFTS, strict=True))
    ]


def assert_same(ours: Encoded, theirs: Encoded) -> None:
    assert (ours.rows, ours.echo) == (theirs.rows, theirs.echo)
    scale = theirs.cr_N_D.abs().max().item()
    torch.testing.assert_close(ours.cr_N_D, theirs.cr_N_D, rtol=0, atol=2e-5 * scale)
    if theirs.logsumexp_N is not None:
        torch.testing.assert_close(ours.logsumexp_N, theirs.logsumexp_N, rtol=0, atol=1e-4)
    if isinstance(ours, Decoded) and isinstance(theirs, Decoded):
        assert ours.top1_N.tolist() == theirs.top1_N.tolist()
        torch.testing.assert_close(ours.top1_logprob_N, theirs.top1_logprob_N, rtol=0, atol=1e-4)


def test_drafts_beside_encoded_texts_are_those_of_transformers(engine: GenerationEngine, truth: Engine) -> None:
    batches = draft_batches()
    drafting = engine.drafting(4096)
    drafting.join(batches)
    for starts in ([0] * 10, [len(ids) - 1 for ids in PROMPTS], [len(ids) // 2 for ids in PROMPTS]):
        batch = EncodeBatch(PROMPTS, starts, with_logsumexp=True, tenant="tenant 1")
        assert_same(engine.encode(batch), truth.encode(batch))
    for ours, theirs in zip(run_to_end(drafting, batches), drafted(truth, batches), strict=True):
        assert_same(ours, theirs)


def test_cached_states_are_removed_beside_running_drafts(engine: GenerationEngine, truth: Engine) -> None:
    batches = draft_batches()
    drafting = engine.drafting(4096)
    drafting.join(batches)
    for _ in range(3):
        assert vllm_model(engine).reset_cache()
    for ours, theirs in zip(run_to_end(drafting, batches), drafted(truth, batches), strict=True):
        assert_same(ours, theirs)


def test_what_clients_left_ends_in_vllm(engine: GenerationEngine, truth: Engine) -> None:
    batches = draft_batches(frozenset())
    drafting = engine.drafting(4096)
    drafting.join(batches)
    for batch in batches[1:]:
        drafting.leave(batch)
    assert_same(run_to_end(drafting, batches[:1])[0], drafted(truth, batches[:1])[0])
    model = vllm_model(engine)
    until(lambda: not model._llm.output_processor.has_unfinished_requests())


def test_a_text_as_long_as_the_memory_for_states_goes_on(tiny_models: TinyModels, truth: Engine) -> None:
    """There is no room for the copy of a block, so the whole blocks must do."""
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 5 * _BLOCK_BYTES}
    settings = support.make_settings(device="cpu", dtype="float32", max_sequence_tokens=127, vllm_options=options)
    engine = load_engine(tiny_models["llama"], settings)
    (text,) = random_ids(3, [127], shared=0)
    for tokens in (100, 110, 127):
        batch = EncodeBatch([text[:tokens]], [tokens - 1], with_logsumexp=True, tenant="long")
        assert_same(engine.encode(batch), truth.encode(batch))


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the simulated GPU")
def test_model_runner_2_and_asynchronous_scheduling_give_the_same_rows() -> None:
    """On a simulated GPU, the tests above."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "tests" / "simulated_gpu"), str(root)])
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--engine", "vllm"]
    command += [str(Path(__file__).relative_to(root)), "-k", "pieces"]
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "3 passed" in result.stdout
