"""The engine over a model that drafts by itself, with a tiny model that caches prefixes like vLLM."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
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
from plm_owner_server.engines.vllm.engine import GenerationEngine
from plm_owner_server.engines.vllm.loading import VllmSettings, load_vllm_engine
from plm_owner_server.engines.vllm.model_runner import GenerationRunner, TextQuery, TextRows
from plm_owner_server.service.plm_service import PlmService
from protocol.errors import InvalidRequest, NotReady, Unsupported
from protocol.messages import EncodeRequest
from tests import support
from tests.drafting import drafted
from tests.support import random_ids

BLOCK = 8


class Blocks:
    """Drafts with a real model. Of texts that it has seen from the same tenant it knows whole blocks before `start`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.seen: set[tuple[str, tuple[int, ...]]] = set()
        self.queries: list[TextQuery] = []
        self.faults: list[Exception] = []
        self.spoil: Callable[[TextRows], TextRows] = lambda rows: rows
        self.held: list[tuple[TextQuery, Future[TextRows]]] | None = None
        self.alive = True
        self.pulses: list[Future[Any]] = []

    def is_alive(self) -> bool:
        return self.alive

    def submit(self, query: TextQuery) -> Future[TextRows]:
        self.queries.append(query)
        future: Future[TextRows] = Future()
        if self.held is not None:
            self.held.append((query, future))
        elif self.faults:
            future.set_exception(self.faults[-1])
        else:
            future.set_result(self.spoil(self.run(query)))
        return future

    def release(self) -> None:
        """Run what is held and was not cancelled."""
        for query, future in self.held or []:
            if future.set_running_or_notify_cancel():
                future.set_result(self.run(query))
        self.held = None

    def pulse(self) -> Future[Any]:
        self.pulses.append(Future())
        return self.pulses[-1]

    def reset_cache(self) -> bool:
        self.seen.clear()
        return True

    @torch.inference_mode()
    def run(self, query: TextQuery) -> TextRows:
        ids, tenant, start, drafted = query.token_ids, query.tenant, query.start, list[int]()
        cached = max((end for end in range(0, start + 1, BLOCK) if (tenant, tuple(ids[:end])) in self.seen), default=0)
        self.seen |= {(tenant, tuple(ids[:end])) for end in range(BLOCK, len(ids), BLOCK)}
        while len(drafted) <= query.look_ahead and not query.stop_token_ids & set(drafted):
            logits_T_V = self.model(input_ids=torch.tensor([[*ids, *drafted]])).logits[0]
            drafted.append(int(logits_T_V[-1].argmax()))
        text = [*ids, *drafted[:-1]]
        hidden_T_D = self.model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
        top1_logit_T, top1_T = logits_T_V.max(dim=-1)
        return TextRows(
            hidden_T_D=hidden_T_D[start:],
            logsumexp_T=logits_T_V.logsumexp(dim=-1)[start:],
            top1_logit_T=top1_logit_T[start:],
            top1_T=top1_T[start:],
            ran_token_ids=text[start:],
            drafted=drafted,
            cached_tokens=cached,
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
        runner = GenerationRunner(self.blocks, prefix_cache_ttl=600, clock=self.clock)
        self.engine = GenerationEngine(runner, info=info, head=head)
        self.truth = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0)


@pytest.fixture
def setting(tiny_models: TinyModels) -> Setting:
    return Setting(tiny_models["llama"])


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


def _without_last_row(rows: TextRows) -> TextRows:
    columns = {name: getattr(rows, name)[:-1] for name in ("hidden_T_D", "logsumexp_T", "top1_logit_T", "top1_T")}
    return replace(rows, ran_token_ids=rows.ran_token_ids[:-1], **columns)


SPOILED: dict[str, Callable[[TextRows], TextRows]] = {
    "a row is missing": _without_last_row,
    "another token was run": lambda rows: replace(rows, ran_token_ids=[*rows.ran_token_ids[:-1], 3]),
    "another token was drafted": lambda rows: replace(rows, drafted=[3, *rows.drafted[1:]]),
    "more was drafted": lambda rows: replace(rows, drafted=rows.drafted * 2),
    "a requested position was cached": lambda rows: replace(rows, cached_tokens=11),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_other_rows_than_requested_are_an_error_that_clients_retry(setting: Setting, fault: str) -> None:
    batch = DraftBatch([random_ids(3, [12])[0]], [10], [4])
    expected = drafted(setting.truth, [batch])[0]
    assert 3 not in (expected.top1_N[0], batch.token_ids[0][-1], expected.top1_N[-2])
    setting.blocks.spoil = SPOILED[fault]
    drafting = setting.engine.drafting(4096)
    drafting.join([batch])
    with pytest.raises(NotReady, match="other rows") as caught:
        drafting.step()
    assert caught.value.retry_after_s
    setting.blocks.spoil = lambda rows: rows
    assert_same(drafted(setting.engine, [batch])[0], expected)


def test_drafts_are_those_of_the_engine_over_transformers(setting: Setting) -> None:
    ids = random_ids(4, [5, 18, 1, 9])
    plain = DraftBatch(ids, [4, 10, 0, 0], [6, 0, 9, 3])
    (free,) = drafted(setting.truth, [plain])
    # A token that is drafted for a while, so that some end with it and others do not.
    stops = frozenset([EOS, int(free.top1_N[2])])
    batches = [plain, DraftBatch(ids, [4, 17, 0, 8], [9, 9, 9, 9], stops, "acme")]
    for ours, theirs in zip(drafted(setting.engine, batches), drafted(setting.truth, batches), strict=True):
        assert_same(ours, theirs)
    # One query for each sequence, all its drafts included.
    assert len(setting.blocks.queries) == 2 * len(ids)


def test_who_joins_late_or_leaves_changes_nothing_for_the_others(setting: Setting) -> None:
    one, two, gone = (DraftBatch(random_ids(seed, [6, 4]), [5, 3], [4, 7]) for seed in (5, 6, 7))
    held: list[tuple[TextQuery, Future[TextRows]]] = []
    setting.blocks.held = held
    drafting = setting.engine.drafting(4096)
    drafting.join([one, gone])
    assert drafting.step() == []
    drafting.leave(gone)
    assert [future.cancelled() for _, future in held] == [False, False, True, True]
    drafting.join([two])
    setting.blocks.release()
    done = dict(drafting.step())
    assert done.keys() == {one, two}
    for batch in (one, two):
        assert_same(done[batch], drafted(setting.truth, [batch])[0])


def test_an_error_leaves_no_query_at_the_model(setting: Setting) -> None:
    batches = [DraftBatch(random_ids(seed, [6, 4]), [5, 3], [4, 7]) for seed in (5, 6)]
    held: list[tuple[TextQuery, Future[TextRows]]] = []
    setting.blocks.held = held
    drafting = setting.engine.drafting(4096)
    drafting.join(batches)
    for _, future in held[:2]:
        future.set_exception(RuntimeError("EngineDeadError"))
    with pytest.raises(RuntimeError, match="Dead"):
        drafting.step()
    assert all(future.done() for _, future in held)
    assert drafting.step() == []


def test_a_step_takes_as_long_as_a_pass_that_hangs(setting: Setting) -> None:
    """So the supervisor, which measures calls, finds out."""
    setting.blocks.held = []
    drafting = setting.engine.drafting(4096)
    drafting.join([DraftBatch(random_ids(5, [6]), [5], [4])])
    drafting.step()
    assert not setting.blocks.pulses  # a step comes back soon
    setting.clock.now += 2
    thread = threading.Thread(target=drafting.step)
    thread.start()
    support.until(lambda: bool(setting.blocks.pulses), within_s=60)
    assert thread.is_alive()
    setting.blocks.pulses[0].set_result(False)
    thread.join(60)
    assert not thread.is_alive()
    setting.clock.now += 2
    setting.blocks.alive = False  # its processes have ended, so that no pulse will come
    drafting.step()


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


@pytest.mark.parametrize("column", ["hidden_T_D", "logsumexp_T", "top1_logit_T"])
def test_a_head_that_is_not_the_models_is_noticed(setting: Setting, column: str) -> None:
    setting.engine.warm_up()
    setting.blocks.spoil = lambda rows: replace(rows, **{column: 1.01 * getattr(rows, column)})
    with pytest.raises(Unsupported, match="head"):
        setting.engine.warm_up()
    setting.blocks.spoil = lambda rows: replace(rows, **{column: torch.nan * getattr(rows, column)})
    with pytest.raises(Unsupported, match="head"):
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
