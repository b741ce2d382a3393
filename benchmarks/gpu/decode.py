"""Decoding on the GPU: time of a step against transformers' `generate` and against the limit of the memory's speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from benchmarks.gpu.machine import Machine, record
from benchmarks.gpu.models import (
    SHAPES,
    random_model,
    random_texts,
    state_bytes_of_a_token,
    weight_bytes_of_a_step,
)
from plm_owner_server.engines.interface import DraftBatch
from plm_owner_server.engines.transformers.engine import TransformersEngine

_BATCHES = (1, 8, 64)
_PROMPT_TOKENS, _STEPS = 64, 48


def main() -> None:
    """Measure the shapes one after another, and each of the batch sizes."""
    machine = Machine.from_arguments()
    bytes_per_s = machine.copy_bytes_per_s()
    record({"copy_gb_per_s": bytes_per_s / 1e9})
    for shape in SHAPES:
        model = random_model(shape, machine)
        model.generation_config.eos_token_id = None  # every text gets all its tokens
        for batch in _BATCHES:
            record({shape: {f"batch_{batch}": _measure(machine, model, batch, bytes_per_s)}})
        del model


def _measure(machine: Machine, model: PreTrainedModel, batch: int, bytes_per_s: float) -> dict[str, float]:
    texts = random_texts(machine, model, batch, _PROMPT_TOKENS)
    steps = 4 if machine.quick else _STEPS
    theirs = _seconds_a_step(machine, steps, lambda tokens: _generate(model, texts, tokens + 1))
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0)
    ours = _seconds_a_step(machine, steps, lambda tokens: draft(engine, texts, tokens))
    tokens = batch * (len(texts[0]) + steps / 2)
    least = (weight_bytes_of_a_step(model) + tokens * state_bytes_of_a_token(model)) / bytes_per_s
    return {
        "ms_a_step": 1000 * ours,
        "generate_ms_a_step": 1000 * theirs,
        "bandwidth_limit_ms": 1000 * least,
        "over_generate": theirs / ours,
        "over_limit": least / ours,
    }


def _seconds_a_step(machine: Machine, steps: int, decode: Callable[[int], object]) -> float:
    """Duration of a step without that of the prompt: the difference of two lengths."""
    few, many = (machine.seconds(lambda n=n: decode(n), rounds=2) for n in (1, 1 + steps))  # type: ignore[misc]
    return max(many - few, 1e-9) / steps


def draft(engine: TransformersEngine, texts: list[list[int]], tokens: int) -> None:
    """Draft some tokens after each text, in one batch."""
    drafting = engine.drafting(sum(map(len, texts)))
    drafting.join([DraftBatch(texts, [len(ids) - 1 for ids in texts], [tokens] * len(texts))])
    while not drafting.step():
        pass


@torch.inference_mode()
def _generate(model: PreTrainedModel, texts: list[list[int]], tokens: int) -> None:
    model.set_attn_implementation("sdpa")  # transformers' own, which the engine has replaced
    ids_B_T = torch.tensor(texts, device=model.device)
    mask_B_T = torch.ones_like(ids_B_T)
    model.generate(ids_B_T, attention_mask=mask_B_T, do_sample=False, max_new_tokens=tokens, pad_token_id=0)


if __name__ == "__main__":
    main()
