"""What a model's own configuration says of its head and of its end, for every engine alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from protocol.head import LMHead


def described_head(config: Any, weight_V_D: Tensor, bias_V: Tensor | None) -> LMHead:
    """The LM head of a model with this weight and bias.

    Args:
        config: of the text model.
        weight_V_D: a row for each token.
        bias_V: None if it has none.
    """
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(weight_V_D, bias_V, _logit_scale(config), softcap)


def end_tokens(config: Any, generation_config: Any) -> tuple[int, ...]:
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
