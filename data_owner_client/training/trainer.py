"""Training the adapter on an external memory: reconstruction first, then jointly with prediction.

(1) Reconstruction: A and B_rct minimise L_rct, the mean over rows and coordinates of (B_rct A x − x)².
(2) Joint: B_rct frozen; A and B_pd minimise κ·L_rct + (1 − κ)·L_pd with L_pd = CE(head(h_pd), y).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from data_owner_client.adapter.network import Adapter
from data_owner_client.runtime.background import prefetch_one
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.batches import Batch, MemoryStats, RowStream, ShardSource
from data_owner_client.training.checkpoint import Checkpoint
from data_owner_client.training.loss import cross_entropy
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.validation import ValidationData, target_logprobs
from protocol.errors import InvalidRequest, NumericalFault
from protocol.head import LMHead

_CHECKPOINT_EVERY_SECONDS = 60.0
# Version of the checkpoint layout.
_FORMAT = 4
# Steps that are timed for an estimate, after a first one.
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Epoch:
    """One pass over the memory.

    Attributes:
        phase: `reconstruction` or `joint`.
        epoch: number of the epoch in its phase, from 1.
        reconstruction_loss: mean over the batches.
        prediction_loss: mean over the batches, in nats per token; None in the reconstruction phase.
        validation_nll: loss of the mixture at its best constant λ, in nats per token; None in the reconstruction phase.
    """

    phase: str
    epoch: int
    reconstruction_loss: float
    prediction_loss: float | None
    validation_nll: float | None


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Attributes:
        settings: settings of the training.
        adapter: the adapter of the best validation epoch.
        history: all epochs.
        best_nll: validation loss of that adapter, in nats per token.
        seconds: duration of the training, the time before an interruption included.
    """

    settings: TrainingSettings
    adapter: Adapter
    history: list[Epoch]
    best_nll: float
    seconds: float = 0.0


@dataclass
class _Progress:
    """Counters of a running training.

    Attributes:
        epoch: number of the running epoch, of both phases together, from 0.
        step: number of finished batches of the running epoch.
        reconstruction: sum of the reconstruction losses of these batches.
        prediction: sum of the prediction losses of these batches.
        best_nll: validation loss of the best epoch so far.
        since_best: number of epochs since the best one.
        seconds: duration so far.
        history: the finished epochs.
    """

    epoch: int = 0
    step: int = 0
    reconstruction: float = 0.0
    prediction: float = 0.0
    best_nll: float = math.inf
    since_best: int = 0
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The counters in a checkpoint's form."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> _Progress:
        """The counters of a checkpoint."""
        return cls(**record | {"history": [Epoch(**epoch) for epoch in record["history"]]})


def train_adapter(
    memory: ShardSource,
    stats: MemoryStats,
    head: LMHead,
    validation: ValidationData,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    identity: object = None,
    reporter: Reporter | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train an adapter. The same data, settings and thread count give the same adapter, interrupted or not.

    Args:
        memory: source of the rows, of which a few shards are in RAM at a time.
        stats: statistics of the memory; the training runs along its principal axes.
        head: float32 LM-head rows of the candidates.
        validation: held-out rows, which decide the best epoch.
        settings: training settings.
        checkpoint: file for the state of the training, from which the same call resumes; None for no checkpoint.
        identity: digests of everything that decides the result besides `settings`; other checkpoints are ignored.
        reporter: shows the progress and the losses.
        clock: seconds of a monotonic clock, for the duration.

    Raises:
        InvalidData: a shard is damaged, or the disk is full.
        InvalidRequest: the device does not exist, or its memory is too small.
        NumericalFault: the loss is not finite.
    """
    stream = RowStream(memory, stats.candidate_ids_C, batch_rows=settings.batch_rows, seed=settings.seed)
    device = _device(settings.device)
    store = None
    if checkpoint is not None:
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads()
        result_identity = [_FORMAT, identity, settings.of_network, str(device), hardware, torch.__version__]
        store = Checkpoint(checkpoint, result_identity, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        try:
            training = _Training(stream, head, validation, settings, device, stats, store)
            training.run(reporter or Reporter(), clock)
        except torch.cuda.OutOfMemoryError as error:
            raise InvalidRequest(
                f"The memory of {device} does not suffice for this training.", hint="Use --device cpu."
            ) from error
    return training.result()


def estimate_seconds(
    memory: ShardSource,
    stats: MemoryStats,
    head: LMHead,
    validation: ValidationData,
    settings: TrainingSettings,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """The duration of a training with all its epochs, in seconds, from that of a few steps on this machine.

    See `train_adapter` for the arguments and errors.
    """
    stream = RowStream(memory, stats.candidate_ids_C, batch_rows=settings.batch_rows, seed=settings.seed)
    device, joint = _device(settings.device), replace(settings, reconstruction_epochs=0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        training = _Training(stream, head, validation, joint, device, stats, None)
        seconds = training.step_seconds(_TIMED_STEPS, clock)
    return seconds * stream.steps * (settings.reconstruction_epochs + settings.epochs)


class _Training:
    """A training, from its beginning or from a checkpoint."""

    def __init__(
        self,
        stream: RowStream,
        head: LMHead,
        validation: ValidationData,
        settings: TrainingSettings,
        device: torch.device,
        stats: MemoryStats,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._stream = stream
        self._settings = settings
        self._checkpoint = checkpoint
        self._device = device
        # Everything is rotated to these axes, and the adapter is rotated back at the end.
        self._axes_D_D = stats.axes_D_D.to(device)
        self._head = head.to(device)
        self._head = replace(self._head, weight_V_D=self._head.weight_V_D @ self._axes_D_D.T)
        self._held_out, self._validation = validation.data.rotated(stats.axes_D_D), validation
        hidden_size = head.weight_V_D.shape[1]
        rank = min(settings.rank, hidden_size)
        self._adapter = Adapter(
            hidden_size,
            rank,
            settings.form or "residual",
            rms=stats.rms,
            head_rms=head.weight_V_D.square().mean().sqrt().item(),
            dropout=settings.dropout,
        ).to(self._device)
        self._average: AveragedModel | None = None
        if settings.ema_decay:
            self._average = AveragedModel(self._adapter, multi_avg_fn=partial(_update_average, settings.ema_decay))
        self._progress, self._best = _Progress(), copy.deepcopy(self._adapter.state_dict())
        state = None if checkpoint is None else checkpoint.load(self._adapter, self._average)
        if state is not None:
            self._progress, self._best = _Progress.from_json(state.progress), state.best
        self._optimiser = self._new_optimiser()
        if state is not None:
            groups = self._optimiser.state_dict()["param_groups"]
            self._optimiser.load_state_dict({"state": state.optimiser, "param_groups": groups})

    def run(self, reporter: Reporter, clock: Callable[[], float]) -> None:
        """Train until the last epoch, or until `patience` epochs have brought no improvement."""
        settings, progress = self._settings, self._progress
        began = clock() - progress.seconds
        total = settings.reconstruction_epochs + settings.epochs
        if progress.epoch or progress.step:
            reporter.say(f"Going on from the checkpoint: epoch {progress.epoch + 1}, step {progress.step + 1}.")
        done = progress.epoch * self._stream.steps + progress.step
        with reporter.bar("training", self._stream.steps * total, "steps", done=done) as bar:
            while progress.epoch < total and progress.since_best < settings.patience:
                saved_at = time.monotonic()
                for batch in self._batches():
                    bar.advance(1, self._step(batch))
                    progress.seconds = clock() - began
                    if time.monotonic() - saved_at > _CHECKPOINT_EVERY_SECONDS:
                        self._save()
                        saved_at = time.monotonic()
                self._end_epoch()
                progress.seconds = clock() - began
                self._save()

    def step_seconds(self, steps: int, clock: Callable[[], float]) -> float:
        """Mean duration of a step of joint training, in seconds, after a first one that may take longer."""
        batch = next(self._batches())
        self._step(batch)
        began = clock()
        for _ in range(steps):
            self._step(batch)
        return (clock() - began) / steps

    def result(self) -> Trained:
        """The adapter of the best epoch, on the CPU and in the axes of the representations."""
        self._adapter.load_state_dict(self._best)
        self._adapter.rotate_back(self._axes_D_D)
        progress = self._progress
        adapter = self._adapter.cpu().eval()
        return Trained(self._settings, adapter, progress.history, progress.best_nll, progress.seconds)

    @property
    def _joint(self) -> bool:
        return self._progress.epoch >= self._settings.reconstruction_epochs

    def _new_optimiser(self) -> torch.optim.Optimizer:
        adapter = self._adapter
        adapter.B_rct.requires_grad_(not self._joint)
        if self._joint:
            trained = [value for name, value in adapter.named_parameters() if name != "B_rct.weight"]
        else:
            trained = [*adapter.A.parameters(), *adapter.B_rct.parameters()]
        return torch.optim.Adam(trained, lr=self._settings.learning_rate)

    def _batches(self) -> Iterator[Batch]:
        batches = self._stream.epoch(self._progress.epoch, start=self._progress.step)
        if self._device.type != "cuda":
            yield from batches
            return
        # Read and shuffle while the GPU computes. On a CPU this would only take its cores.
        for batch in prefetch_one(batches):
            yield batch.to_device(self._device)

    def _step(self, batch: Batch) -> str:
        """Train on a batch; return the losses in words."""
        progress, adapter, kappa = self._progress, self._adapter, self._settings.kappa
        self._set_learning_rate()
        batch = batch.rotated(self._axes_D_D)
        with torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext():
            x_B_D = adapter.scaled(batch.cr_N_D)
            loss = reconstruction = F.mse_loss(adapter.reconstruction(x_B_D), x_B_D)
            words = f"reconstruction {reconstruction.item():.3f}"
            if self._joint:
                recent_B_F = adapter.recent_features(self._head, batch.previous_N_P)
                h_B_D = adapter.hidden(adapter.scaled(batch.cr_N_D, batch.matches_N), recent_B_F)
                prediction = cross_entropy(h_B_D, self._head, batch.label_N)
                loss = kappa * reconstruction + (1 - kappa) * prediction
                progress.prediction += prediction.item()
                number = progress.epoch - self._settings.reconstruction_epochs + 1
                words = f"epoch {number}  prediction {prediction.item():.3f}"
                words += "" if math.isinf(progress.best_nll) else f"  validation {progress.best_nll:.4f}"
        if not torch.isfinite(loss):
            raise NumericalFault("The training loss is not finite.", hint="Try a smaller --learning-rate.")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._optimiser.step()
        if self._joint and self._average is not None:
            self._average.update_parameters(adapter)
        progress.reconstruction += reconstruction.item()
        progress.step += 1
        return words

    def _set_learning_rate(self) -> None:
        """Set Adam's rate, which falls along a cosine in the joint phase."""
        settings, progress = self._settings, self._progress
        rate = settings.learning_rate
        if self._joint:
            step = (progress.epoch - settings.reconstruction_epochs) * self._stream.steps + progress.step
            rate *= (1 + math.cos(math.pi * step / (settings.epochs * self._stream.steps))) / 2
        for group in self._optimiser.param_groups:
            group["lr"] = rate

    def _end_epoch(self) -> None:
        progress, first_joint = self._progress, self._settings.reconstruction_epochs
        reconstruction, prediction = (total / progress.step for total in (progress.reconstruction, progress.prediction))
        if self._joint:
            evaluated = self._adapter if self._average is None else cast(Adapter, self._average.module)
            logprob_N = target_logprobs(evaluated, self._head, self._held_out)
            _, nll = self._validation.best(logprob_N, "constant")
            progress.history.append(Epoch("joint", progress.epoch - first_joint + 1, reconstruction, prediction, nll))
            progress.since_best += 1
            if nll < progress.best_nll:
                progress.best_nll, progress.since_best = nll, 0
                self._best = copy.deepcopy(evaluated.state_dict())
        else:
            progress.history.append(Epoch("reconstruction", progress.epoch + 1, reconstruction, None, None))
        was_joint = self._joint
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.reconstruction = progress.prediction = 0.0
        if self._joint != was_joint:
            self._optimiser = self._new_optimiser()

    def _save(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save(self._progress.as_json(), self._adapter, self._optimiser, self._best, self._average)


@torch.no_grad()
def _update_average(decay: float, average: list[Tensor], weights: list[Tensor], steps: Tensor) -> None:
    """Move the average towards the weights.

    The decay begins small, as in TensorFlow's `ExponentialMovingAverage(num_updates)`: a constant one would keep most
    of the first weights in trainings of few steps.
    """
    count = int(steps)
    torch._foreach_lerp_(average, weights, 1 - min(decay, (1 + count) / (10 + count)))


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only CPUs and CUDA are supported")
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InvalidRequest(
            f"There is no device {name!r} to train on: {str(error).splitlines()[0]}", hint="Use --device cpu."
        ) from error
    return device
