"""The engine over a model that schedules itself, with a tiny model that caches prefixes like vLLM."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from harness.tiny_models import EOS, TinyModels
from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch
from plm_owner_server.engines.model_files.digest import digest_folder
from plm_owner_server.engines.model_files.lm_head import read_head
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.engines.transformers.engine import TransformersEngine, load_model
from plm_owner_server.engines.vllm.async_llm import VllmSettings, load_vllm_engine
from plm_owner_server.engines.vllm.engine import PooledEngine
from plm_owner_server.engines.vllm.model_runner import HiddenStateQuery, HiddenStates, PooledRunner
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidRequest, NotReady, ServerFault, Unsupported
from protocol.messages import EncodeRequest
from tests import support
from tests.support import random_ids

BLOCK = 8


class Blocks:
    """Returns a real model's states, but not those of whole blocks that it has seen before from the same tenant."""

    block_tokens = BLOCK

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.seen: set[tuple[str, tuple[int, ...]]] = set()
        self.queries: list[HiddenStateQuery] = []
        self.faults: list[Exception] = []
        self.lost_rows = 0
        self.alive = True

    def is_alive(self) -> bool:
        return self.alive

    def run(self, queries: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        if self.faults:
            raise self.faults[-1]
        return [self._run(query) for query in queries]

    def reset_cache(self) -> bool:
        self.seen.clear()
        return True

    def _run(self, query: HiddenStateQuery) -> HiddenStates:
        self.queries.append(query)
        ids, tenant, cached = query.token_ids, query.tenant, 0
        ends = range(BLOCK, len(ids), BLOCK)  # the newest token is always run
        if not query.skip_cache:
            cached = max((end for end in ends if (tenant, tuple(ids[:end])) in self.seen), default=0)
        self.seen |= {(tenant, tuple(ids[:end])) for end in ends}
        hidden_T_D = self.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return HiddenStates(
            list(ids), hidden_T_D[-1:] if query.last_only else hidden_T_D[cached + self.lost_rows :], cached
        )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Setting:
    """The engine, its model, and the truth: the engine over transformers without a cache."""

    def __init__(self, folder: Path) -> None:
        model = load_model(folder, device="cpu", dtype="float32")
        head, info = read_head(folder, dtype=torch.float32, device="cpu")
        self.blocks, self.clock = Blocks(model), Clock()
        runner = PooledRunner(self.blocks, prefix_cache_ttl=600, clock=self.clock)
        self.engine = PooledEngine(runner, info=info, head=head)
        self.truth = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0)


@pytest.fixture
def setting(tiny_models: TinyModels) -> Setting:
    return Setting(tiny_models["llama"])


def drafted(engine: Any, *batches: DraftBatch) -> list[Decoded]:
    drafting = engine.drafting(4096)
    drafting.join(batches)
    done: dict[DraftBatch, Decoded] = {}
    while len(done) < len(batches):
        done |= dict(drafting.step())
    return [done[batch] for batch in batches]


def assert_same(ours: Any, theirs: Any) -> None:
    assert (ours.rows, ours.echo) == (theirs.rows, theirs.echo)
    torch.testing.assert_close(ours.cr_N_D, theirs.cr_N_D, rtol=1e-4, atol=1e-4)
    if theirs.logsumexp_N is not None:
        torch.testing.assert_close(ours.logsumexp_N, theirs.logsumexp_N, rtol=1e-4, atol=1e-4)
    if isinstance(theirs, Decoded):
        assert ours.top1_N.tolist() == theirs.top1_N.tolist()
        torch.testing.assert_close(ours.top1_logprob_N, theirs.top1_logprob_N, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", support.ARCHITECTURES_IN_CI)
def test_the_head_in_the_checkpoint_is_the_models_own(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models[architecture]
    theirs = TransformersEngine(load_model(folder, device="cpu", dtype="float32"), cr_kind="last_hidden_state")
    head, info = read_head(folder, dtype=torch.float32, device="cpu")
    assert info == theirs.info
    assert torch.equal(head.weight_V_D, theirs.head.weight_V_D)
    assert head.trailer() == theirs.head.trailer()
    assert (head.bias_V is None) == (theirs.head.bias_V is None)
    if head.bias_V is not None and theirs.head.bias_V is not None:
        assert torch.equal(head.bias_V, theirs.head.bias_V)


def test_a_folder_without_a_head_is_a_clear_error(tiny_models: TinyModels, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_models["llama"] / "config.json").read_bytes())
    with pytest.raises(Unsupported, match="no weights"):
        read_head(tmp_path, dtype=torch.float32, device="cpu")
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(Unsupported, match="no LM head"):
        read_head(tmp_path, dtype=torch.float32, device="cpu")
    with pytest.raises(Unsupported, match=r"causal language model .* cannot be loaded"):
        read_head(tmp_path / "nowhere", dtype=torch.float32, device="cpu")


def test_exactly_the_requested_positions_are_returned(setting: Setting) -> None:
    setting.engine.warm_up()
    ids = random_ids(1, [20, 33, 1, 20], shared=10)
    for starts in ([0, 0, 0, 19], [10, 9, 0, 4], [19, 32, 0, 0]):
        for tenant in ("", "acme"):
            batch = EncodeBatch(ids, starts, with_logsumexp=True, tenant=tenant)
            assert_same(setting.engine.encode(batch), setting.truth.encode(batch))
    assert setting.engine.stats.cached_tokens > 0
    assert {query.tenant for query in setting.blocks.queries} == {"", "acme"}


def test_only_incomplete_results_are_requested_again(setting: Setting) -> None:
    (ids,) = random_ids(2, [30])
    # The 24 tokens of three blocks are cached; 16 of their positions will be requested.
    setting.engine.encode(EncodeBatch([ids], [29]))
    setting.blocks.queries.clear()
    batch = EncodeBatch([ids, ids], [8, 24])
    assert_same(setting.engine.encode(batch), setting.truth.encode(batch))
    assert [query.skip_cache for query in setting.blocks.queries] == [False, False, True]
    # If no block ends before the first requested position, the cache is skipped at once.
    setting.blocks.queries.clear()
    setting.engine.encode(EncodeBatch([ids], [7]))
    assert [query.skip_cache for query in setting.blocks.queries] == [True]


def test_a_model_that_loses_rows_is_never_believed(setting: Setting) -> None:
    setting.blocks.lost_rows = 1
    with pytest.raises(ServerFault, match="other positions"):
        setting.engine.encode(EncodeBatch(random_ids(3, [12]), [3]))


def test_drafts_are_those_of_the_engine_over_transformers(setting: Setting) -> None:
    ids = random_ids(4, [5, 18, 1, 9])
    plain = DraftBatch(ids, [4, 10, 0, 0], [6, 0, 9, 3])
    (free,) = drafted(setting.truth, plain)
    # A token that is drafted for a while, so that some end with it and others do not.
    stops = frozenset([EOS, int(free.top1_N[2])])
    batches = [plain, DraftBatch(ids, [4, 17, 0, 8], [9, 9, 9, 9], stops, "acme")]
    for ours, theirs in zip(drafted(setting.engine, *batches), drafted(setting.truth, *batches), strict=True):
        assert_same(ours, theirs)
    # All was cached but the last tokens, and the first blocks of texts whose early positions are requested.
    assert setting.engine.stats.passes["step"].tokens < 40 * BLOCK


def test_who_joins_late_or_leaves_changes_nothing_for_the_others(setting: Setting) -> None:
    one, two, gone = (DraftBatch(random_ids(seed, [6, 4]), [5, 3], [4, 7]) for seed in (5, 6, 7))
    drafting = setting.engine.drafting(4096)
    drafting.join([one, gone])
    done = dict(drafting.step())
    drafting.leave(gone)
    drafting.join([two])
    while len(done) < 2:
        done |= dict(drafting.step())
    assert gone not in done
    for batch in (one, two):
        assert_same(done[batch], drafted(setting.truth, batch)[0])


def test_cached_states_are_removed_in_time(setting: Setting) -> None:
    batch = EncodeBatch(random_ids(8, [20]), [19])
    setting.engine.encode(batch)
    setting.clock.now = 599
    setting.engine.evict_idle()
    assert setting.blocks.seen
    setting.clock.now = 600
    setting.engine.evict_idle()
    assert not setting.blocks.seen
    # Also while the model is busy: the next run removes them.
    setting.engine.encode(batch)
    setting.clock.now = 1300
    before = setting.engine.stats.cached_tokens
    setting.engine.encode(batch)
    assert setting.engine.stats.cached_tokens == before


@pytest.mark.parametrize("dead", [RuntimeError("EngineDeadError"), ConnectionError()])
def test_a_model_that_is_dead_breaks_the_service(setting: Setting, tiny_models: TinyModels, dead: Exception) -> None:
    folder = tiny_models["llama"]
    service = PlmService(
        setting.engine,
        load_tokenizer(folder),
        name="llama",
        weights_digest=digest_folder(folder),
        settings=support.make_settings(model=str(folder)),
        master_secret=lambda: support.MASTER_SECRET,
    )
    request = EncodeRequest(token_ids=[[5, 6]], from_position=[0])
    service.encode(request)
    setting.blocks.faults.append(dead)
    with pytest.raises(NotReady):
        service.encode(request)
    assert service.scheduler.broken.is_set()


def test_normalised_states_are_noticed(setting: Setting) -> None:
    run = setting.blocks.run

    def normalised(queries: Sequence[HiddenStateQuery]) -> list[HiddenStates]:
        rows = [torch.nn.functional.normalize(one.hidden_T_D, dim=-1) for one in run(queries)]
        return [HiddenStates(query.token_ids, row, 0) for query, row in zip(queries, rows, strict=True)]

    setting.blocks.run = normalised  # type: ignore[method-assign]
    with pytest.raises(Unsupported, match="normalised"):
        setting.engine.warm_up()


def test_without_vllm_it_is_said_what_to_install(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    # Loading sets variables for vLLM's processes; servers that later tests start would tell of those they do not know.
    with patch.dict(os.environ), pytest.raises(InvalidRequest, match="pip install"):
        load_vllm_engine(tiny_models["llama"], VllmSettings())


def test_vllm_gives_no_ffn_output() -> None:
    with pytest.raises(ValueError, match="ffn_output"):
        support.make_settings(engine="vllm", cr_kind="ffn_output")
