"""Encoding on the GPU: rows a second against the bare forward pass, and what goes to the host."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from benchmarks.gpu.machine import Machine, record
from benchmarks.gpu.models import SHAPES, random_model, random_texts
from benchmarks.gpu.trace import traced
from plm_owner_server.engines.interface import EncodeBatch
from plm_owner_server.engines.transformers.engine import TransformersEngine

_TEXTS, _TOKENS = 32, 128  # the tokens of one pass of the server


def main() -> None:
    """Measure the shapes one after another."""
    machine = Machine.from_arguments()
    for shape in SHAPES:
        model = random_model(shape, machine)
        record({shape: _measure(machine, model)})
        del model


def _measure(machine: Machine, model: PreTrainedModel) -> dict[str, object]:
    texts = random_texts(machine, model, _TEXTS, _TOKENS)
    rows = sum(map(len, texts))
    bare = machine.seconds(lambda: _bare(model, texts))
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0)
    figures: dict[str, object] = {"rows": rows, "bare_rows_per_s": rows / bare}
    for name, with_logsumexp in (("rows", False), ("rows_and_logsumexp", True)):
        batch = EncodeBatch(texts, [0] * len(texts), with_logsumexp)
        trace = traced(machine, lambda batch=batch: engine.encode(batch))  # type: ignore[misc]
        rate = {"rows_per_s": rows / trace.seconds, "over_bare": bare / trace.seconds}
        figures[name] = rate | trace.figures()
    return figures


@torch.inference_mode()
def _bare(model: PreTrainedModel, texts: list[list[int]]) -> None:
    """Run transformers' own forward pass without the head; its result stays on the device."""
    ids_B_T = torch.tensor(texts, device=model.device)
    model.base_model(input_ids=ids_B_T, attention_mask=torch.ones_like(ids_B_T), use_cache=False)


if __name__ == "__main__":
    main()
