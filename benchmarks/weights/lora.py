"""LoRA on the PLM itself (Hu et al., ICLR 2022, arXiv 2106.09685): low-rank updates of all linear layers, by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from benchmarks.weights.trainee import Outcome, Trainee
from plm_owner_server.engines.transformers.engine import load_model

_RATES = (3e-4, 1e-3)
_RANK, _ALPHA, _DROPOUT = 16, 32, 0.05


def prepare(folder: Path) -> Trainee:
    """The PLM with untrained low-rank updates, which are merged into its weights at the end."""
    updated = with_updates(load_model(folder, device="cpu", dtype="float32"))
    what = "LoRA trained on the PLM itself, which needs its weights"
    return Trainee(
        model=updated.get_base_model(),
        rates=_RATES,
        outcomes={"lora": Outcome(what, updated.merge_and_unload)},
        details={"rank": _RANK, "alpha": _ALPHA, "dropout": _DROPOUT},
    )


def with_updates(model: PreTrainedModel) -> Any:
    """The model of peft's with untrained low-rank updates of all linear layers of a model."""
    config = LoraConfig(
        r=_RANK, lora_alpha=_ALPHA, lora_dropout=_DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)
