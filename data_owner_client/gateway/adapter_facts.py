"""Facts about a served adapter, as the page's second tab shows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from data_owner_client.adapter.bounds import TextBounds
from data_owner_client.adapter.card import AdapterCard
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.types import AdapterForm
from data_owner_client.gateway.served_models import ServedModel, UnknownModel
from data_owner_client.memory.store import MANIFEST, TRAIN, VALIDATION, ExternalMemory
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.identity import ModelIdentity
from data_owner_client.training.exchange import Exchange
from data_owner_client.training.policies import DecodingPolicy
from data_owner_client.training.train import REPORT, TrainingReport, Trial
from protocol.errors import InvalidData
from protocol.types import WireDtype


class TaskFacts(BaseModel):
    """Name, kind and prompt format of a task, and the number of its labels."""

    name: str
    kind: str
    format: str
    labels: int


class MemoryFacts(BaseModel):
    """Size of the memories that an adapter was trained and validated on.

    Attributes:
        folder: folder of both memories.
        pairs: pairs to train on.
        rows: target tokens to train on.
        validation_pairs: pairs to validate on.
        validation_rows: target tokens to validate on.
        source_tokens: tokens of the sources to train on.
        dtype: number format of the representations.
    """

    folder: str
    pairs: int
    rows: int
    validation_pairs: int
    validation_rows: int
    source_tokens: int
    dtype: WireDtype


class AdapterFacts(BaseModel):
    """Facts about one version of an adapter.

    Attributes:
        name: name by which applications choose it.
        version: version that is served.
        created: time of the adapter's card, in seconds since 1970.
        task: task of the adapter.
        model: model that it adapts.
        context_mode: contexts of its memory.
        form: form of the network.
        rank: rank of its matrices.
        candidates: number of candidate tokens.
        nearest: retrieved examples in each prompt.
        length_ratio: target tokens per source token.
        mean_length: mean target length in tokens.
        bounds: bounds of a text; None for none.
        interpolation: schedule or gate that `train` chose.
        interpolation_why: reason for that choice, in words.
        label_temperature: temperature of the labels' probabilities.
        settings: training settings.
        validation: validation scores by name.
        memory: size of the memory; None if it is not found.
        history: epochs of the chosen training; empty without the training's report.
        trials: trainings that were tried.
        trial_weights: share of each trial in the adapter's distribution, 0 for those that are not used.
        policies: decoding policies that were tried, the chosen one first.
        training_seconds: duration of `train`; None without its report.
        exchange: what each side has learned of the other; None if neither report nor memory says.
    """

    name: str
    version: str
    created: int
    task: TaskFacts
    model: ModelIdentity
    context_mode: ContextMode
    form: AdapterForm
    rank: int
    candidates: int
    nearest: int
    length_ratio: float
    mean_length: float
    bounds: TextBounds | None
    interpolation: Interpolation
    interpolation_why: str
    label_temperature: float
    settings: dict[str, bool | int | float | str | None]
    validation: dict[str, float]
    memory: MemoryFacts | None = None
    history: list[dict[str, float | int | str | None]] = []
    trials: list[Trial] = []
    trial_weights: list[float] = []
    policies: list[DecodingPolicy] = []
    training_seconds: float | None = None
    exchange: Exchange | None = None


def adapter_facts(model: ServedModel) -> AdapterFacts:
    """The facts about a served adapter. Its report and memory are left out if they belong to another version.

    Raises:
        UnknownModel: the model is the PLM alone.
    """
    if model.adapter is None or model.folder is None:
        raise UnknownModel(f"{model.name} is the owner's model, not an adapter.", hint="Choose an adapter.")
    card = model.adapter.card
    report = _report(model.folder, card)
    memories = _memories(model.folder, report, card)
    copied = AdapterFacts.model_fields.keys() & AdapterCard.model_fields.keys() - {"task"}
    return AdapterFacts(
        name=model.name,
        version=model.version,
        created=model.created,
        task=TaskFacts(name=card.task.name, kind=card.task.kind, format=card.task.format, labels=len(card.task.labels)),
        memory=None if memories is None else _memory_facts(*memories),
        exchange=_exchange(report, memories),
        **{name: getattr(card, name) for name in copied},
        **({} if report is None else _of_report(report)),
    )


def _report(folder: Path, card: AdapterCard) -> TrainingReport | None:
    """The report of the training that made the adapter; None if there is none."""
    try:
        report = TrainingReport.model_validate_json((folder / REPORT).read_bytes())
    except (OSError, ValidationError):
        return None
    # The report's card was made before the tensors had a digest.
    return report if report.card == card.model_copy(update={"tensors_sha256": ""}) else None


def _of_report(report: TrainingReport) -> dict[str, Any]:
    card = report.card
    members = [(member.settings, member.weight) for member in card.members] or [(card.settings, 1.0)]
    return {
        "history": report.history,
        "trials": report.trials,
        "trial_weights": [
            sum(weight for settings, weight in members if settings == trial.settings) for trial in report.trials
        ],
        "policies": report.options,
        "training_seconds": report.seconds,
    }


def _memories(
    folder: Path, report: TrainingReport | None, card: AdapterCard
) -> tuple[ExternalMemory, ExternalMemory] | None:
    """The memories that the adapter was made from; None if they are not found.

    The digest is computed of the manifest alone, without reading a shard.
    """
    for candidate in _memory_folders(folder, report):
        try:
            train, validation = ExternalMemory(candidate / TRAIN), ExternalMemory(candidate / VALIDATION)
        except InvalidData:
            continue
        if train.digest == card.memory_digest:
            return train, validation
    return None


def _memory_folders(folder: Path, report: TrainingReport | None) -> Iterator[Path]:
    """The folder that the report names, and those beside the adapter, as in the examples of the guide."""
    if report is not None and report.memory is not None:
        yield Path(report.memory)
    yield from sorted(manifest.parents[1] for manifest in folder.absolute().parent.glob(f"*/{TRAIN}/{MANIFEST}"))


def _memory_facts(train: ExternalMemory, validation: ExternalMemory) -> MemoryFacts:
    return MemoryFacts(
        folder=train.folder.parent.name,
        pairs=train.manifest.examples,
        rows=train.manifest.rows,
        validation_pairs=validation.manifest.examples,
        validation_rows=validation.manifest.rows,
        source_tokens=train.manifest.source_tokens,
        dtype=train.manifest.plan.dtype,
    )


def _exchange(report: TrainingReport | None, memories: tuple[ExternalMemory, ExternalMemory] | None) -> Exchange | None:
    """The report's counts; for reports of earlier versions, those of the memory."""
    if report is not None and report.exchange is not None:
        return report.exchange
    try:
        return None if memories is None else Exchange.from_memories(*memories)
    except InvalidData:  # a memory without its texts
        return None
