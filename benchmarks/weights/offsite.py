"""Offsite-tuning (Xiao, Lin & Han 2023, arXiv 2302.04870): adapter layers and a compressed emulator leave the owner.

The first and the last layers of the PLM are the adapter. The emulator is the PLM without some of the layers between
them, chosen at equal distances and frozen. The data owner trains the adapter through the emulator, and the owner plugs
the trained layers into the full model. Embeddings and LM head go along, frozen, as no layer can be trained without
them. The owner distils the emulator once, as the authors do for models of this size, but on much less text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.in_process import save_model
from benchmarks.layer_drop import layers_of, uniform_choice, without_other_layers
from benchmarks.weights.distillation import chunks, distil, public_text
from benchmarks.weights.trainee import Outcome, Trainee, weight_bytes
from plm_owner_server.engines.model_files.config import load_config
from plm_owner_server.engines.model_files.tokenizer import load_tokenizer
from plm_owner_server.engines.transformers.engine import load_model

_RATES = (1e-4, 3e-4, 1e-3)
# The paper's: two layers at each end, and eight of the twenty between them for OPT-1.3B.
ADAPTER_LAYERS = 2
_EMULATOR_SHARE = 0.4
DISTILLATION_TOKENS = 200_000
EMULATORS = Path("runs/compare/emulators")
"""Folder of the emulators that owners send; each is distilled once."""


def prepare(folder: Path) -> Trainee:
    """The PLM's ends with an emulator of its middle, of which the ends are trained."""
    layers, adapter = load_config(folder).get_text_config().num_hidden_layers, ADAPTER_LAYERS
    middle = max(1, round(_EMULATOR_SHARE * (layers - 2 * adapter)))
    sent_folder = EMULATORS / f"{folder.name}-{adapter}-{middle}"
    if not sent_folder.exists():
        _make_emulator(folder, sent_folder, adapter=adapter, middle=middle)
    emulator = load_model(sent_folder, device="cpu", dtype="float32")
    ends = _require_gradients_of_ends(emulator, adapter)
    returned, sent = weight_bytes(*(layers_of(emulator)[number] for number in ends)), weight_bytes(emulator)
    what = f"offsite-tuning: {adapter} layers at each end trained, {middle} of {layers - 2 * adapter} between them sent"
    return Trainee(
        model=emulator,
        rates=_RATES,
        outcomes={
            "offsite_emulator": Outcome(f"{what}; as the data owner has it", lambda: emulator, 0, sent),
            "offsite": Outcome(
                f"{what}; plugged into the full model",
                lambda: plug_in(load_model(folder, device="cpu", dtype="float32"), emulator, adapter=adapter),
                returned,
                sent,
            ),
        },
        details={
            "adapter_layers": adapter,
            "emulator_layers": middle,
            "layers": layers,
            "distillation_tokens": DISTILLATION_TOKENS,
        },
    )


def with_emulator(full: PreTrainedModel, *, adapter: int, middle: int) -> PreTrainedModel:
    """A copy of a model with fewer layers, of which only those at its ends require gradients.

    Args:
        full: the model.
        adapter: number of layers at each end.
        middle: number of layers between the ends that stay.
    """
    count = len(layers_of(full))
    between = [adapter + number for number in uniform_choice(count - 2 * adapter, middle)]
    emulator = without_other_layers(full, [*range(adapter), *between, *range(count - adapter, count)])
    _require_gradients_of_ends(emulator, adapter)
    return emulator


@torch.no_grad()
def plug_in(full: PreTrainedModel, emulator: PreTrainedModel, *, adapter: int) -> PreTrainedModel:
    """The full model with the emulator's layers at its ends, changed in place."""
    for number in _ends(adapter):
        layers_of(full)[number].load_state_dict(layers_of(emulator)[number].state_dict())
    return full


def _make_emulator(model: Path, folder: Path, *, adapter: int, middle: int) -> None:
    """Write a distilled emulator of the model in a folder."""
    full = load_model(model, device="cpu", dtype="float32")
    emulator = with_emulator(full, adapter=adapter, middle=middle)
    ids = load_tokenizer(model)(public_text()).input_ids
    losses = distil(full, emulator, chunks(ids, DISTILLATION_TOKENS), adapter=adapter)
    print(f"distilled: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last of {len(losses)}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        save_model(emulator, model, Path(scratch) / "emulator")
        (Path(scratch) / "emulator").rename(folder)


def _require_gradients_of_ends(model: PreTrainedModel, adapter: int) -> list[int]:
    """Let the layers at both ends require gradients, and nothing else; return their numbers."""
    model.requires_grad_(False)
    for number in _ends(adapter):
        layers_of(model)[number].requires_grad_()
    return _ends(adapter)


def _ends(adapter: int) -> list[int]:
    """Numbers of the layers at both ends; those of the last ones are negative."""
    return [*range(adapter), *range(-adapter, 0)]
