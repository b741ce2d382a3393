"""Look-ahead over added round-trip time, with a model whose steps take as long as those of OPT-1.3B.

Its weights are random, so the pairs are made up and learned by heart. The adapter is trained for real, and the client's
own drafts come of the pairs' targets. Tokens per second are compared with those without look-ahead.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Machine, record
from benchmarks.gpu.models import random_model
from data_owner_client import (
    DecodingSettings,
    Generation,
    InProcessConnection,
    Interpolation,
    Pair,
    RemotePlm,
    Task,
    TrainedAdapter,
    TrainingSettings,
    build_memories,
    train,
    translate,
)
from harness.tiny_models import BOS, EOS, PAD, VOCAB_SIZE, tiny_tokenizer
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.settings import ServerSettings
from protocol.messages import DecodeRequest, DecodeResponse

_ROUND_TRIPS_MS = (0, 20, 100)
_VERBS, _ADVERBS = ("turn on", "turn off", "dim", "check"), ("now", "later", "at night", "for an hour")
_ROOMS = ("kitchen", "hall", "cellar", "attic", "bathroom", "office", "garage", "nursery")
_THINGS = ("light", "heater", "fan", "radio", "oven", "shutter")
_TASK = Task(name="made-up", source_label="In", target_label="Out")
_TEXTS, _MOST_TOKENS = 32, 40


class _Far:
    """A service that is some round-trip time away.

    Args:
        service: answers the calls.
        seconds: round-trip time of a call to decode.
    """

    def __init__(self, service: PlmService, seconds: float) -> None:
        self._service = service
        self._seconds = seconds
        self.model_card, self.tokenizer, self.lm_head = service.model_card, service.tokenizer, service.lm_head
        self.encode, self.distribution = service.encode, service.distribution

    def decode(self, request: DecodeRequest) -> DecodeResponse:
        """Answer after the round-trip time."""
        time.sleep(self._seconds)
        return self._service.decode(request)


def main() -> None:
    """Train an adapter, then measure each round-trip time."""
    machine = Machine.from_arguments()
    special: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model = random_model("opt-1.3b", machine, vocab_size=VOCAB_SIZE, **special)
    service = PlmService(
        TransformersEngine(model, cr_kind="last_hidden_state"),
        tiny_tokenizer(),
        name="random",
        weights_digest="random",
        settings=ServerSettings(_env_file=None),
        master_secret=lambda: b"none",
    )
    plm, pairs = RemotePlm(InProcessConnection(service)), _pairs(96 if machine.quick else 768)
    with tempfile.TemporaryDirectory() as folder:
        adapter = _adapter(plm, pairs, Path(folder), epochs=1 if machine.quick else 6)
    sources = [pair.source for pair in pairs[:: len(pairs) // _TEXTS]][: 4 if machine.quick else _TEXTS]
    for ms in _ROUND_TRIPS_MS:
        far = RemotePlm(InProcessConnection(_Far(service, ms / 1000)))
        without, ours = (_translate(far, adapter, sources, look_ahead) for look_ahead in (0, None))
        same = sum(a == b for a, b in zip(without.token_ids, ours.token_ids, strict=True))
        record(
            {
                f"round_trip_{ms}_ms": {
                    "speedup": _tokens_per_s(ours) / _tokens_per_s(without),
                    "tokens_per_s": _tokens_per_s(ours),
                    "round_trips_per_token": ours.stats.round_trips / ours.stats.tokens,
                    "accepted_share": ours.stats.accepted / max(1, ours.stats.drafted),
                    "same_texts": same / len(sources),
                }
            }
        )


def _pairs(count: int) -> list[Pair]:
    combinations = itertools.product(_ADVERBS, _ROOMS, _THINGS, _VERBS)
    return [
        Pair(f"{verb} the {room} {thing} {adverb}", f"{verb} | {room} | {thing} | {adverb}")
        for adverb, room, thing, verb in itertools.islice(combinations, count)
    ]


def _adapter(plm: RemotePlm, pairs: list[Pair], folder: Path, *, epochs: int) -> TrainedAdapter:
    memory = folder / "memory"
    build_memories(plm, _TASK, pairs, memory, validation=pairs[:16], context_mode="teacher-forced", share_targets=True)
    settings = TrainingSettings(
        epochs=epochs, gate=False, search=False, retrieved_examples=0, selection_texts=0, minutes=0
    )
    return train(plm, memory, folder / "adapter", settings=settings)[0]


def _translate(plm: RemotePlm, adapter: TrainedAdapter, sources: list[str], look_ahead: int | None) -> Generation:
    plm.tokenizer.ids_containing("\n")  # found before the clock starts
    return translate(
        plm,
        sources,
        adapter=adapter,
        interpolation=Interpolation(schedule="constant", lambda_max=0.9),
        decoding=DecodingSettings(look_ahead=look_ahead, batch_size=_TEXTS, max_new_tokens=_MOST_TOKENS),
    )


def _tokens_per_s(generation: Generation) -> float:
    return generation.stats.tokens / generation.seconds


if __name__ == "__main__":
    main()
