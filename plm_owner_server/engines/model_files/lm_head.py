"""Reading of the LM head from a checkpoint, for engines that run the model without its head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from plm_owner_server.engines.interface import EngineInfo
from plm_owner_server.engines.model_files.config import (
    CAUSAL_LM_HINT,
    eos_token_ids,
    head_from_config,
    linear_head,
    load_config,
    unloadable,
)
from plm_owner_server.engines.model_files.weights import open_weights, weight_files
from protocol.errors import Unsupported
from protocol.head import LMHead


def read_head(folder: Path, *, dtype: torch.dtype, device: str) -> tuple[LMHead, EngineInfo]:
    """Read the head and the description of a model.

    Args:
        folder: folder with configuration and weights, in the Hugging Face layout.
        dtype: dtype that the head is converted to.
        device: device that the head is loaded on.

    Raises:
        Unsupported: the folder holds no causal language model with a linear head.
    """
    config = load_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # every architecture has errors of its own
        raise unloadable(folder, "causal language model", error, CAUSAL_LM_HINT) from error
    output = linear_head(model)
    text = config.get_text_config()
    name_of = {id(module): name for name, module in model.named_modules()}
    modules = [name_of[id(output)]]
    if text.tie_word_embeddings:
        modules.append(name_of[id(model.get_input_embeddings())])
    files = weight_files(folder)
    weight_V_D = _read(files, [f"{module}.weight" for module in modules])
    if weight_V_D is None or weight_V_D.shape != output.weight.shape:
        raise Unsupported(
            f"The weights in {folder} have no LM head of {tuple(output.weight.shape)}.",
            hint="Give a folder with weights that are not quantised.",
        )
    bias_V = None if output.bias is None else _read(files, [f"{modules[0]}.bias"])
    head = head_from_config(text, weight_V_D.to(device, dtype), None if bias_V is None else bias_V.to(device, dtype))
    info = EngineInfo(
        hidden_size=weight_V_D.shape[1],
        vocab_size=weight_V_D.shape[0],
        max_tokens=getattr(text, "max_position_embeddings", None),
        dtype=str(dtype).removeprefix("torch."),
        cr_kind="last_hidden_state",
        eos_token_ids=eos_token_ids(text, _generation_config(folder)),
    )
    return head, info


def caps_attention(folder: Path) -> bool:
    """Return whether the model's attention has soft-capped logits (Gemma 2).

    Raises:
        Unsupported: the configuration cannot be loaded.
    """
    return getattr(load_config(folder).get_text_config(), "attn_logit_softcapping", None) is not None


def _read(files: Sequence[Path], names: Sequence[str]) -> Tensor | None:
    """The first of these tensors that exists. Checkpoints may omit the first part of a name, or add one."""
    for name in names:
        for path in files:
            with open_weights(path) as tensors:
                for stored, read in tensors.items():
                    if stored == name or stored.endswith(f".{name}") or name.endswith(f".{stored}"):
                        return read()
    return None


def _generation_config(folder: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
