"""The last feed-forward output against what surrounds it in transformers' own forward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.tiny_models import TinyModels
from plm_owner_server.engines.transformers.engine import load_model
from protocol.errors import Unsupported
from protocol.messages import DecodeRequest, EncodeRequest
from tests.support import ARCHITECTURES_IN_CI, make_service, random_ids
from tests.transformers_engine import Truth, assert_near, drafts

# How the last block's feed-forward output can be had from what surrounds it: (block, its module whose input is the
# residual stream before the feed-forward layer, factor on the output before the addition).
_BEFORE_FFN = {
    "opt": ("final_layer_norm", 1.0),
    "llama": ("post_attention_layernorm", 1.0),
    "mistral": ("post_attention_layernorm", 1.0),
    "qwen2": ("post_attention_layernorm", 1.0),
    "qwen3": ("post_attention_layernorm", 1.0),
    "gpt2": ("ln_2", 1.0),
    "granite": ("post_attention_layernorm", 0.5),
}


def last_block(model: PreTrainedModel) -> torch.nn.Module:
    base = getattr(model.base_model, "decoder", model.base_model)
    block: torch.nn.Module = (base.h if hasattr(base, "h") else base.layers)[-1]
    return block


def watched(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and output of the last block (as "") and of each of its children in one unpadded pass."""
    block, seen, handles = last_block(model), {}, []

    def keep(name: str, _: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = args[0] if args else kwargs.get("hidden_states")
        result = output[0] if isinstance(output, tuple) else output
        seen[name] = (first.reshape(len(ids), -1).cpu(), result.reshape(len(ids), -1).cpu())

    for name, module in [("", block), *block.named_children()]:
        handles.append(module.register_forward_hook(functools.partial(keep, name), with_kwargs=True))
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def feed_forward_output(architecture: str, model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    seen = watched(model, ids)
    block_in, block_out = seen[""]
    if architecture in _BEFORE_FFN:
        norm, factor = _BEFORE_FFN[architecture]
        return (block_out - seen[norm][0]) / factor
    if architecture in ("cohere", "phi"):  # attention and feed-forward side by side
        return block_out - block_in - seen["self_attn"][1]
    return seen["post_feedforward_layernorm"][0]  # Gemma: a norm before the addition


def test_a_feed_forward_output_that_the_head_cannot_take_is_refused(tiny_models: TinyModels) -> None:
    with pytest.raises(Unsupported, match="32 wide, its head takes 16"):
        make_service(tiny_models["opt-projected"], cr_kind="ffn_output")


@pytest.mark.parametrize(
    "architecture", [one for one in ARCHITECTURES_IN_CI if one.values != ("opt-projected",)], indirect=True
)
def test_ffn_output_is_what_the_last_block_adds(
    architecture: str, model: PreTrainedModel, tiny_models: TinyModels, truth: Truth
) -> None:
    service = make_service(tiny_models[architecture], cr_kind="ffn_output")
    sequences = random_ids(17, [20, 5, 33], shared=3)
    encoded = service.encode(EncodeRequest(token_ids=sequences, from_position=[3, 0, 30], dtype="float32"))
    assert encoded.last_hidden_N_D is not None
    rows = encoded.rows_B.tolist()
    parts = zip(sequences, [3, 0, 30], encoded.cr_N_D.split(rows), encoded.last_hidden_N_D.split(rows), strict=True)
    for ids, start, cr_T_D, last_hidden_T_D in parts:
        assert_near(cr_T_D, feed_forward_output(architecture, model, ids)[start:])
        assert_near(last_hidden_T_D, truth(ids)[0][start:])

    decoded = service.decode(DecodeRequest(token_ids=sequences, look_ahead=[6, 6, 6], dtype="float32"))
    assert decoded.last_hidden_N_D is not None
    rows = decoded.rows_B.tolist()
    drafting = zip(
        sequences, drafts(decoded), decoded.cr_N_D.split(rows), decoded.last_hidden_N_D.split(rows), strict=True
    )
    for ids, tokens, cr_K_D, last_hidden_K_D in drafting:
        ran = [*ids, *tokens[:-1]]
        assert_near(cr_K_D, feed_forward_output(architecture, model, ran)[len(ids) - 1 :])
        assert_near(last_hidden_K_D, truth(ran)[0][len(ids) - 1 :])
    assert service.model_card().cr_kind == "ffn_output"


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_gemma_normalises_the_ffn_output_before_it_adds_it(architecture: str, tiny_models: TinyModels) -> None:
    """So that the note on Gemma in the engine stays true: its CR is the layer's own output, not the addend."""
    model = load_model(tiny_models[architecture], device="cpu", dtype="float32")
    seen = watched(model, random_ids(18, [12])[0])
    addend = seen[""][1] - seen["pre_feedforward_layernorm"][0]
    assert_near(seen["post_feedforward_layernorm"][1], addend)
    assert not torch.allclose(seen["post_feedforward_layernorm"][0], addend, rtol=0.1)
