"""The check at the start: it decodes, and refuses what no client could decode with."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from harness import tiny_models
from harness.tiny_models import MAX_POSITIONS, VOCAB_SIZE, TinyModels
from plm_owner_server.engines.decoding_check import check_decoding
from plm_owner_server.engines.loading import load_engine
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.engines.transformers.kv_cache import KvLayout
from plm_owner_server.engines.vllm.engine import GenerationEngine
from plm_owner_server.engines.vllm.model_runner import GenerationRunner, TextQuery, TextRows
from protocol.errors import Unsupported
from tests import support

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": tiny_models.PAD,
    "bos_token_id": tiny_models.BOS,
    "eos_token_id": tiny_models.EOS,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_INDEXER = _LATENT | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
REFUSED = {
    "conv": lambda: transformers.Lfm2Config(**_COMMON, layer_types=["conv", "full_attention"]),
    "indexed_attention": lambda: transformers.DeepseekV32Config(**_COMMON, **_INDEXER),
    "hybrid": lambda: transformers.FalconH1Config(
        **_COMMON, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "linear_attention": lambda: transformers.MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, state_size=4
    ),
    "recurrent": lambda: transformers.RwkvConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2),
    # Without a cache of keys and values.
    "cannot be run": lambda: transformers.OpenAIGPTConfig(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=4, n_positions=MAX_POSITIONS
    ),
}
"""Architectures that cannot be decoded with, by a word of the reason."""

ACCEPTED = {
    "latent attention": lambda: transformers.DeepseekV3Config(**_COMMON, **_LATENT),
    "attention sinks": lambda: transformers.GptOssConfig(
        **_COMMON, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
    ),
    "biases by distance": lambda: transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),
    "parallel blocks": lambda: transformers.FalconConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}
"""Attention of other kinds than that of `harness.tiny_models`."""


def save(config: PretrainedConfig, folder: Path) -> Path:
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.transformers_only("what vLLM runs, it runs differently")
@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.filterwarnings("ignore")  # of transformers, for such small models
def test_an_architecture_that_cannot_decode_is_refused_at_the_start(word: str, tmp_path: Path) -> None:
    folder = save(REFUSED[word](), tmp_path)
    with pytest.raises(Unsupported, match=word) as caught:
        load_engine(folder, support.make_settings(device="cpu", dtype="float32"))
    assert "Llama" in caught.value.hint


@pytest.mark.transformers_only("what vLLM runs, it runs differently")
@pytest.mark.parametrize("kind", ACCEPTED)
@pytest.mark.filterwarnings("ignore")  # of transformers, for such small models
def test_attention_of_other_kinds_passes(kind: str, tmp_path: Path) -> None:
    engine = load_engine(save(ACCEPTED[kind](), tmp_path), support.make_settings(device="cpu", dtype="float32"))
    assert engine.stats.cached_tokens == engine.stats.cached_bytes == 0  # the check leaves nothing
    assert {passes.count for passes in engine.stats.passes.values()} == {0}


def test_states_that_come_back_wrong_from_the_cache_are_found(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    check_decoding(TransformersEngine(model, cr_kind="last_hidden_state"))
    unpack = KvLayout.unpack

    def shifted(layout: KvLayout, pieces: Any, lengths: Any) -> Any:
        return unpack(layout, [[part.roll(1, dims=1) for part in parts] for parts in pieces], lengths)

    monkeypatch.setattr(KvLayout, "unpack", shifted)
    with pytest.raises(Unsupported, match="differs from one pass"):
        check_decoding(TransformersEngine(model, cr_kind="last_hidden_state"))


class ForgetfulModel:
    """A model that drafts by itself, and drops what its layers remember of a cached prefix."""

    def __init__(self, folder: Path, *, forgets: bool) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.forgets = forgets
        self.seen: set[tuple[int, ...]] = set()

    def submit(self, query: TextQuery) -> Future[TextRows]:
        future: Future[TextRows] = Future()
        future.set_result(self.run(query))
        return future

    def run(self, query: TextQuery) -> TextRows:
        ids, drafted = list(query.token_ids), list[int]()
        cached = max((end for end in range(query.start + 1) if tuple(ids[:end]) in self.seen), default=0)
        self.seen |= {tuple(ids[:end]) for end in range(len(ids))}
        first = cached if self.forgets else 0
        while len(drafted) <= query.look_ahead:
            text = torch.tensor([[*ids, *drafted][first:]])
            drafted.append(int(self.model(input_ids=text).logits[0, -1].argmax()))
        hidden_T_D = self.model.model(input_ids=text).last_hidden_state[0, query.start - first :]
        top1_logit_T, top1_T = self.model.lm_head(hidden_T_D).max(dim=-1)
        ran = [*ids, *drafted[:-1]][query.start :]
        return TextRows(hidden_T_D, torch.zeros(len(ran)), top1_logit_T, top1_T, ran, drafted, cached)

    def pulse(self) -> Future[Any]:
        return Future()

    def reset_cache(self) -> bool:
        return True

    def is_alive(self) -> bool:
        return True


@pytest.mark.parametrize("forgets", [False, True])
def test_an_engine_that_drafts_by_itself_is_checked_alike(forgets: bool, tiny_models: TinyModels) -> None:
    folder = tiny_models["llama"]
    model = ForgetfulModel(folder, forgets=forgets)
    truth = TransformersEngine(model.model, cr_kind="last_hidden_state")
    engine = GenerationEngine(GenerationRunner(model, prefix_cache_ttl=600), info=truth.info, head=truth.head)
    with torch.inference_mode():
        if not forgets:
            check_decoding(engine)
            return
        with pytest.raises(Unsupported, match="differs from one pass"):
            check_decoding(engine)
