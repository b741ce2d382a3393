"""A profile of one step of encoding, decoding and training at OPT-1.3B's shapes, as text: what the GPU waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.gpu.decode import draft
from benchmarks.gpu.machine import Machine, record
from benchmarks.gpu.models import random_model, random_texts
from benchmarks.gpu.trace import traced
from benchmarks.gpu.training import AdapterTraining
from plm_owner_server.engines.interface import EncodeBatch
from plm_owner_server.engines.transformers.engine import TransformersEngine

_STEPS = 4


def main() -> None:
    """Write the profiles into one file, each as it ends."""
    machine = Machine.from_arguments()
    with (machine.folder / "profiles.txt").open("w", encoding="utf-8") as file:
        for name, title, work in _works(machine):
            trace = traced(machine, work, rounds=3)
            file.write(trace.text(title))
            file.flush()
            record({name: trace.figures()})


def _works(machine: Machine) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Work to profile: its name, its title and itself."""
    model = random_model("opt-1.3b", machine)
    engine = TransformersEngine(model, cr_kind="last_hidden_state", prefix_cache_bytes=0)
    texts = random_texts(machine, model, 32, 128)
    batch = EncodeBatch(texts, [0] * len(texts), with_logsumexp=True)
    yield "encode", "encoding 32 texts of 128 tokens with log-sum-exp", lambda: engine.encode(batch)
    for size in (1, 8):
        chosen = texts[:size]
        title = f"prompts of batch {size}, then {_STEPS} steps of decoding"
        yield f"decode_batch_{size}", title, lambda chosen=chosen: draft(engine, chosen, _STEPS)  # type: ignore[misc]
    training = AdapterTraining(machine, 512 if machine.quick else 5_000, 32 * _STEPS)
    yield "training", f"training: {_STEPS} steps of each phase", training.run


if __name__ == "__main__":
    main()
