"""Models of known shapes with random weights, made on the device without a download."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.gpu.machine import Machine

_OPT: dict[str, Any] = {
    "vocab_size": 50_272,
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "num_hidden_layers": 24,
    "ffn_dim": 8192,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "dropout": 0.0,
}
_TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
SHAPES = ("opt-1.3b", "llama-7b")
"""OPT-1.3B (Zhang et al. 2022) and the first Llama 7B (Touvron et al. 2023)."""


def random_model(shape: str, machine: Machine, *, dtype: torch.dtype | None = None, **changes: Any) -> PreTrainedModel:
    """A causal language model with random weights, in evaluation mode; tiny if the machine is to be quick.

    Args:
        shape: one of `SHAPES`.
        machine: where it is made.
        dtype: dtype of the weights; None for the machine's.
        changes: settings of its configuration that differ.
    """
    torch.manual_seed(0)
    if shape == "opt-1.3b":
        tiny = _TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64} if machine.quick else {}
        config = transformers.OPTConfig(**_OPT | tiny | changes)
    else:
        tiny = _TINY | {"intermediate_size": 128} if machine.quick else {}
        config = transformers.LlamaConfig(**tiny | changes)  # whose defaults are the shape of Llama 7B
    with machine.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or machine.dtype)
    return model.to(machine.device).eval()


def random_texts(machine: Machine, model: PreTrainedModel, texts: int, tokens: int) -> list[list[int]]:
    """Random token ids without special tokens; of few tokens if the machine is to be quick."""
    tokens = min(tokens, 16) if machine.quick else tokens
    generator = torch.Generator().manual_seed(1)
    ids_B_T = torch.randint(3, model.config.vocab_size, (texts, tokens), generator=generator)
    return ids_B_T.tolist()


def weight_bytes_of_a_step(model: PreTrainedModel) -> int:
    """Bytes of the weights that one decoding step reads: all but the embeddings that are no part of the LM head."""
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(weight.nbytes for weight in model.parameters())  # each once, also where two modules share it
    return int(total if inputs is head else total - inputs.nbytes)


def state_bytes_of_a_token(model: PreTrainedModel) -> int:
    """Bytes of a token's attention states in all layers."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
