"""Values that every engine derives from a model's configuration, and the defaults of device and dtype."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from protocol.errors import InvalidRequest, Unsupported
from protocol.head import LMHead

CAUSAL_LM_HINT = "It must hold config.json and weights of an AutoModelForCausalLM architecture."
"""Hint for a folder from which no causal language model can be loaded."""
ATTENTION_HINT = "Serve a decoder-only model whose layers all are attention, such as Llama, Qwen or Gemma."
"""Hint for an architecture that cannot be decoded with."""


def device_and_dtype(device: str, dtype: str, *, has_gpu: bool) -> tuple[str, str]:
    """Resolve `auto`: CUDA with bfloat16 if there is a GPU, else the CPU with float32."""
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype


def require_device(device: str) -> None:
    """Check that torch can use a device.

    Raises:
        InvalidRequest: this machine, or its torch, has no such device.
    """
    try:
        torch.empty(1, device=device)
    except Exception as error:  # every kind of device has errors of its own
        raise InvalidRequest(
            f"--device {device} cannot be used: {' '.join(str(error).split()).rstrip('.')}.",
            hint="Use cpu, or cuda (cuda:1 for the second GPU) with a build of torch for it; auto takes what there is.",
        ) from error


def architecture(folder: Path) -> str:
    """Name of the model's class, such as LlamaForCausalLM, for messages; the folder's name if it states none."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    return folder.name


def unloadable(folder: Path, what: str, error: Exception, hint: str) -> Unsupported:
    """The error, in one line, for a folder that a library cannot load.

    Args:
        folder: folder of the model.
        what: part of the model that was to be loaded.
        error: the library's error.
        hint: what the folder must hold.
    """
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return Unsupported(
            f"The {what} in {folder} needs Python code that comes with the model, which is never run here.",
            hint="Serve a model whose classes are part of transformers, or a version that was converted to them.",
        )
    return Unsupported(
        f"The {what} in {folder} cannot be loaded: {type(error).__name__}: {reason.rstrip('.')}.", hint=hint
    )


def load_config(folder: Path) -> PretrainedConfig:
    """Load a model's configuration, without running code of the model.

    Raises:
        Unsupported: transformers cannot load it, or it needs code of the model.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # every architecture has errors of its own
        raise unloadable(folder, "causal language model", error, CAUSAL_LM_HINT) from error


def linear_head(model: Any) -> nn.Linear:
    """The LM head of a transformers causal language model.

    Raises:
        Unsupported: the model has no linear LM head, or is an encoder-decoder.
    """
    output = model.get_output_embeddings()
    if model.config.is_encoder_decoder or not isinstance(output, nn.Linear):
        raise Unsupported(
            f"{type(model).__name__} has no linear LM head on a decoder.", hint="Serve a decoder-only language model."
        )
    return output


def head_from_config(config: Any, weight_V_D: Tensor, bias_V: Tensor | None) -> LMHead:
    """An LM head with the scale and the soft-cap that a model's configuration gives.

    Args:
        config: configuration of the text model.
        weight_V_D: a row for each token.
        bias_V: None if the head has no bias.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(weight_V_D, bias_V, _logit_scale(config), softcap)


def eos_token_ids(config: Any, generation_config: Any) -> tuple[int, ...]:
    """Tokens after which the model itself would stop.

    Args:
        config: configuration of the text model.
        generation_config: the model's generation settings, which take precedence; None if it has none.
    """
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)


def _logit_scale(config: Any) -> float:
    """Factor between the head's product and the logits: Cohere multiplies, Granite divides, Falcon-H1 multiplies."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    return scale / float(getattr(config, "logits_scaling", None) or 1.0)
