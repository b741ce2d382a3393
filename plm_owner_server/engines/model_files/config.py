"""What follows from a model's own description, and from what the owner left open, for every engine alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from protocol.errors import Unsupported
from protocol.head import LMHead


def device_and_dtype(device: str, dtype: str, *, has_gpu: bool) -> tuple[str, str]:
    """Those that were chosen; `auto` means CUDA with bfloat16 where there is a GPU, else the CPU with float32."""
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype


def linear_head(model: Any) -> nn.Linear:
    """The LM head of a causal language model of transformers'.

    Raises:
        Unsupported: it has none, or an encoder before it.
    """
    output = model.get_output_embeddings()
    if model.config.is_encoder_decoder or not isinstance(output, nn.Linear):
        raise Unsupported(
            f"{type(model).__name__} has no linear LM head on a decoder.", hint="Serve a decoder-only language model."
        )
    return output


def head_from_config(config: Any, weight_V_D: Tensor, bias_V: Tensor | None) -> LMHead:
    """The LM head of a model with this weight and bias.

    Args:
        config: of the text model.
        weight_V_D: a row for each token.
        bias_V: None if it has none.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(weight_V_D, bias_V, _logit_scale(config), softcap)


def eos_token_ids(config: Any, generation_config: Any) -> tuple[int, ...]:
    """Tokens after which the model itself would stop.

    Args:
        config: of the text model.
        generation_config: its other settings, which win; None if it has none.
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
