"""Systems that train weights: their losses are those of transformers, and models come apart and together unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.layer_drop import layers_of, uniform_choice, without_other_layers
from benchmarks.weights import distillation, lora, offsite, systems
from benchmarks.weights.systems import Job, run
from benchmarks.weights.trainee import Trainee, weight_bytes
from benchmarks.weights.tuning import Tuner, TuningSettings
from data_owner_client.data.pair_files import write_pairs
from data_owner_client.data.pairs import Pair
from data_owner_client.evaluation.comparison.results import SystemResult
from data_owner_client.memory.tokenized_pairs import TokenizedPair
from harness.tiny_models import TELLING, VOCAB_SIZE, TinyModels, build_model

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ARCHITECTURES = [*TELLING, "gemma3"]
IDS = torch.arange(4, 24)[None]
EXAMPLES = [
    TokenizedPair(prompt=list(range(3, 3 + length)), target=list(range(40, 40 + length // 2 + 1)), source_tokens=1)
    for length in (3, 9, 5, 14)
]


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize(("layers", "wanted", "numbers"), [(14, 6, [0, 3, 5, 8, 10, 13]), (4, 2, [0, 3]), (5, 1, [2])])
def test_layers_are_chosen_at_equal_distances(layers: int, wanted: int, numbers: list[int]) -> None:
    assert uniform_choice(layers, wanted) == numbers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_smaller_model_is_itself_again_from_its_files(architecture: str, tmp_path: Path) -> None:
    model = build_model(architecture)
    smaller = without_other_layers(model, {0, 2})
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(layers_of(loaded)) == 2
    torch.testing.assert_close(_logits(loaded), _logits(smaller))
    # The larger one is as it was.
    torch.testing.assert_close(_logits(model), _logits(build_model(architecture)))
    assert not torch.allclose(_logits(model), _logits(smaller))


def test_an_untuned_adapter_plugs_back_into_the_same_model() -> None:
    full = build_model("llama")
    emulator = offsite.with_emulator(full, adapter=1, middle=1)
    before = _logits(full)
    torch.testing.assert_close(_logits(offsite.plug_in(full, emulator, adapter=1)), before, rtol=0, atol=0)


def test_only_the_ends_of_an_emulator_are_trained_and_plugged_in() -> None:
    full, untouched = build_model("gemma3"), build_model("gemma3")
    emulator = offsite.with_emulator(full, adapter=1, middle=1)
    trained = {weight for weight in emulator.parameters() if weight.requires_grad}
    assert trained == {*layers_of(emulator)[0].parameters(), *layers_of(emulator)[-1].parameters()}
    with torch.no_grad():
        for weight in emulator.parameters():
            weight.mul_(2)
    offsite.plug_in(full, emulator, adapter=1)
    original = untouched.state_dict()
    changed = {name for name, weight in full.state_dict().items() if not torch.equal(weight, original[name])}
    assert changed == {name for name in original if ".layers.0." in name or ".layers.2." in name}


def test_distillation_changes_the_middle_alone_until_it_resembles_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "RATE", 3e-3)  # few steps
    full = build_model("gemma3")
    emulator, sent = (offsite.with_emulator(full, adapter=1, middle=1) for _ in range(2))
    with torch.no_grad():  # the one layer between the ends is the full model's own: spoil it
        for weight in layers_of(emulator)[1].parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(3, VOCAB_SIZE, (40, 32), generator=torch.Generator().manual_seed(0))
    losses = distillation.distil(full, emulator, ids.repeat(5, 1), adapter=1)
    assert losses[-1] < losses[0] / 2
    before = sent.state_dict()
    changed = {name for name, weight in emulator.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".layers.1." in name}
    # Nothing is lost between equal models.
    assert distillation.distil(full, offsite.with_emulator(full, adapter=1, middle=1), ids[:8], adapter=1) == [
        pytest.approx(0, abs=1e-9)
    ]


def test_weights_are_counted_once_in_half_precision() -> None:
    model = build_model("qwen3")  # its embeddings are its head
    assert weight_bytes(model) == 2 * sum(weight.numel() for weight in model.parameters())
    assert weight_bytes(model, model.base_model) == weight_bytes(model)


def test_merged_lora_answers_as_the_unmerged_one(tiny_models: TinyModels) -> None:
    trainee = lora.prepare(tiny_models["llama"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainee.model.parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    unmerged = _logits(trainee.model)
    merged = trainee.outcomes["lora"].model()
    torch.testing.assert_close(_logits(merged), unmerged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unmerged, _logits(build_model("llama")), atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_that_of_transformers(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    model = build_model(architecture)
    total, tokens = 0.0, 0
    for example in EXAMPLES:
        ids = torch.tensor([example.prompt + example.target])
        labels = ids.clone()
        labels[:, : len(example.prompt)] = -100
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(example.target)
        tokens += len(example.target)
    assert Tuner(model, tmp_path).loss(EXAMPLES) == pytest.approx(total / tokens, rel=1e-4)


def test_training_ends_with_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    model = build_model("llama")
    tuner = Tuner(model, tmp_path)
    untrained = tuner.loss(EXAMPLES)
    report = tuner.tune(EXAMPLES, EXAMPLES, TuningSettings(rates=(1e-6, 3e-3), epochs=3))
    assert report.rate == min(report.probes, key=lambda rate: report.probes[rate]) == 3e-3
    assert min(report.losses) < untrained
    assert tuner.loss(EXAMPLES) == pytest.approx(min(report.losses))
    # Every training begins with the untrained weights.
    assert tuner.train(EXAMPLES, EXAMPLES, 0.0, 1) == [pytest.approx(untrained)]


def _data(folder: Path) -> Path:
    for part, count in (("train", 6), ("validation", 2), ("test", 3)):
        write_pairs(folder / f"{part}.jsonl", [Pair(f"the {part} {i}", f"die {i}") for i in range(count)])
    (folder / "task.toml").write_text('name = "tiny"\n[[examples]]\nsource = "a"\ntarget = "b"\n')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("system", systems.SYSTEMS)
def test_a_system_is_measured_once(
    system: str, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offsite, "ADAPTER_LAYERS", 1)
    monkeypatch.setattr(offsite, "EMULATORS", tmp_path / "emulators")
    monkeypatch.setattr(offsite, "DISTILLATION_TOKENS", 512)
    model, rows = tiny_models["llama"], tmp_path / "rows"
    rows.mkdir()
    job = Job.load(_data(tmp_path), model, None)
    assert not job.task.examples
    prepared, prepare = list[Path](), systems.SYSTEMS[system]

    def counted(folder: Path) -> Trainee:
        prepared.append(folder)
        return prepare(folder)

    monkeypatch.setitem(systems.SYSTEMS, system, counted)
    for _ in range(2):
        run(system, job, model, rows, epochs=1)
    assert len(prepared) == 1
    run(system, job, model, rows, epochs=2)  # another system
    assert len(prepared) == 2
    for result in SystemResult.load_all(rows).values():
        assert len(result.texts) == 3
        assert result.ppl is not None
        assert 1 < result.ppl < VOCAB_SIZE**2
    assert not list(tmp_path.glob(f"{system}-*"))
