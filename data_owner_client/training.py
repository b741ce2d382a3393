"""Training the adapter on an external memory: reconstruction first, then jointly with prediction.

(1) Reconstruction: A and B_rct minimise L_rct, the mean over rows and coordinates of (B_rct A x − x)².
(2) Joint: B_rct frozen; A and B_pd minimise κ·L_rct + (1 − κ)·L_pd with L_pd = CE(head(h_pd), y).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data_owner_client.adapter import Adapter, AdapterForm
from data_owner_client.decoding.interpolation import Interpolation, Schedule, mix
from data_owner_client.memory.store import MemoryRows
from data_owner_client.progress import Reporter
from protocol.errors import InvalidData, NumericalFault
from protocol.head import LMHead

ROWS_AT_ONCE = 4096
_LAMBDAS = tuple(i / 20 for i in range(1, 20))


@dataclass(frozen=True)
class TrainingSettings:
    """What can be set; the defaults need no tuning for memories of a thousand to some hundred thousand rows.

    Attributes:
        form: of the adapter; None for `residual`, which measures better, where the memory allows it, else `paper`.
        rank: R; at most the model's hidden size.
        kappa: κ, weight of the reconstruction loss in the joint phase.
        learning_rate: Adam's, at its peak; it falls to zero along a cosine.
        dropout: probability, on all the time.
        reconstruction_epochs: passes of phase 1.
        epochs: passes of phase 2, at most.
        patience: epochs without a better validation likelihood after which phase 2 ends.
        batch_rows: rows of a step.
        seed: of initialisation, shuffling and dropout.
    """

    form: AdapterForm | None = None
    rank: int = 512
    kappa: float = 0.2
    learning_rate: float = 2e-3
    dropout: float = 0.2
    reconstruction_epochs: int = 2
    epochs: int = 12
    patience: int = 3
    batch_rows: int = 512
    seed: int = 0


@dataclass(frozen=True)
class TrainingData:
    """Rows with their labels among the candidates.

    Attributes:
        cr_N_D: float16 or float32 representations.
        label_N: int64 index into the candidates; −1 where the target is none of them.
    """

    cr_N_D: Tensor
    label_N: Tensor

    @classmethod
    def of(cls, rows: MemoryRows, candidate_ids_C: Tensor) -> TrainingData:
        """Rows of a memory; candidate ids are sorted."""
        target_N = rows.target_N.long()
        at_N = torch.searchsorted(candidate_ids_C, target_N).clamp(max=len(candidate_ids_C) - 1)
        return cls(rows.representations_N_D(), torch.where(candidate_ids_C[at_N] == target_N, at_N, -1))


@dataclass(frozen=True)
class ValidationData:
    """Held-out rows, with the PLM's likelihood of their targets and the λ schedule's inputs.

    Attributes:
        plm_logprob_N: log P_PLM(y), float64.
        position_N: t of each row.
        horizon_N: SL of each row's sequence, in tokens.
    """

    data: TrainingData
    plm_logprob_N: Tensor
    position_N: Tensor
    horizon_N: Tensor

    @classmethod
    def of(
        cls, rows: MemoryRows, candidate_ids_C: Tensor, plm_logprob_N: Tensor, length_ratio: float
    ) -> ValidationData:
        """Rows of a memory; `length_ratio` is the training memory's."""
        horizon_E = (rows.source_tokens_E.double() * length_ratio).clamp(min=1.0)
        return cls(
            TrainingData.of(rows, candidate_ids_C),
            plm_logprob_N,
            rows.position_N(),
            horizon_E.repeat_interleave(rows.rows_E.long()),
        )

    def mixture_nll(self, pema_logprob_N: Tensor, interpolation: Interpolation) -> float:
        """Mean of −log((1 − λ_t)·P_PLM(y) + λ_t·P_PEMA(y)), in nats per token."""
        lambda_N = interpolation.weights(self.position_N, self.horizon_N)
        return -mix(self.plm_logprob_N, pema_logprob_N, lambda_N).mean().item()

    def best(self, pema_logprob_N: Tensor, schedule: Schedule) -> tuple[Interpolation, float]:
        """The schedule with the λ_max of the highest mixture likelihood, and its negative logarithm per token."""
        options = [Interpolation(schedule=schedule, lambda_max=value) for value in _LAMBDAS]
        return min(((option, self.mixture_nll(pema_logprob_N, option)) for option in options), key=lambda x: x[1])


@dataclass(frozen=True)
class Epoch:
    """One pass over the memory. Losses are means per row; `validation_nll` is the mixture's at its best constant λ."""

    phase: str
    epoch: int
    reconstruction_loss: float
    prediction_loss: float | None
    validation_nll: float | None


@dataclass(frozen=True)
class Trained:
    """The adapter of the best validation epoch, and how it got there."""

    adapter: Adapter
    history: list[Epoch]
    best_nll: float


def train_adapter(
    data: TrainingData,
    head: LMHead,
    validation: ValidationData,
    settings: TrainingSettings,
    reporter: Reporter | None = None,
) -> Trained:
    """Train an adapter; the same data, settings and thread count give the same adapter.

    Args:
        data: the memory's rows; every target is a candidate.
        head: float32 head rows of the candidates.
        validation: held-out rows; the adapter of the best epoch is kept.
        settings: see there.
        reporter: told of the progress, with a live loss.

    Raises:
        InvalidData: there are no rows.
        NumericalFault: the loss is no longer finite.
    """
    rows, hidden_size = data.cr_N_D.shape
    if rows == 0:
        raise InvalidData("The memory has no rows.", hint="Build it from at least one pair.")
    rng = torch.Generator().manual_seed(settings.seed)
    rms = float(data.cr_N_D.float().square().mean().sqrt())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        adapter = Adapter(
            hidden_size, min(settings.rank, hidden_size), settings.form or "residual", rms=rms, dropout=settings.dropout
        )
        history: list[Epoch] = []
        best_nll, best_state = math.inf, copy.deepcopy(adapter.state_dict())
        steps = math.ceil(rows / settings.batch_rows)
        total = steps * (settings.reconstruction_epochs + settings.epochs)
        with (reporter or Reporter()).bar("training", total, "steps") as bar:
            optimiser = torch.optim.Adam([adapter.A.weight, adapter.B_rct.weight], lr=settings.learning_rate)
            for epoch in range(1, settings.reconstruction_epochs + 1):
                losses = []
                for index_B in _batches(rows, settings.batch_rows, rng):
                    x_B_D = adapter.scaled(data.cr_N_D[index_B])
                    loss = F.mse_loss(adapter.reconstruction(x_B_D), x_B_D)
                    _step(optimiser, loss)
                    losses.append(loss.item())
                    bar.advance(1, f"reconstruction {losses[-1]:.3f}")
                history.append(Epoch("reconstruction", epoch, _mean(losses), None, None))

            adapter.B_rct.requires_grad_(False)
            optimiser = torch.optim.Adam([adapter.A.weight, adapter.B_pd.weight], lr=settings.learning_rate)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=settings.epochs * steps)
            since_best = 0
            for epoch in range(1, settings.epochs + 1):
                losses, predictions = [], []
                for index_B in _batches(rows, settings.batch_rows, rng):
                    x_B_D = adapter.scaled(data.cr_N_D[index_B])
                    reconstruction = F.mse_loss(adapter.reconstruction(x_B_D), x_B_D)
                    prediction = F.cross_entropy(head.logits(adapter.hidden(x_B_D)), data.label_N[index_B])
                    _step(optimiser, settings.kappa * reconstruction + (1 - settings.kappa) * prediction)
                    decay.step()
                    losses.append(reconstruction.item())
                    predictions.append(prediction.item())
                    validated = "" if math.isinf(best_nll) else f"  validation {best_nll:.4f}"
                    bar.advance(1, f"epoch {epoch}  prediction {predictions[-1]:.3f}{validated}")
                _, nll = validation.best(target_logprobs(adapter, head, validation.data), "constant")
                history.append(Epoch("joint", epoch, _mean(losses), _mean(predictions), nll))
                if nll < best_nll:
                    best_nll, best_state, since_best = nll, copy.deepcopy(adapter.state_dict()), 0
                else:
                    since_best += 1
                    if since_best >= settings.patience:
                        break
    adapter.load_state_dict(best_state)
    return Trained(adapter.eval(), history, best_nll)


def choose_interpolation(
    validation: ValidationData, pema_logprob_N: Tensor
) -> tuple[Interpolation, dict[str, tuple[Interpolation, float]]]:
    """The schedule and λ_max of the highest mixture likelihood on held-out rows.

    Returns:
        The best, and for every schedule its best λ_max with the negative log-likelihood per token.
    """
    schedules: tuple[Schedule, ...] = ("constant", "linear", "gradual")
    best: dict[str, tuple[Interpolation, float]] = {name: validation.best(pema_logprob_N, name) for name in schedules}
    return min(best.values(), key=lambda pair: pair[1])[0], best


@torch.inference_mode()
def target_logprobs(adapter: Adapter, head: LMHead, data: TrainingData) -> Tensor:
    """log P_PEMA(y) of each row, float64; −∞ where the target is no candidate."""
    was_training = adapter.training
    adapter.eval()
    parts = []
    for cr_B_D, label_B in zip(data.cr_N_D.split(ROWS_AT_ONCE), data.label_N.split(ROWS_AT_ONCE), strict=True):
        logprob_B_C = head.logits(adapter.hidden(adapter.scaled(cr_B_D))).log_softmax(dim=-1)
        chosen_B = logprob_B_C.gather(1, label_B.clamp(min=0)[:, None])[:, 0].double()
        parts.append(torch.where(label_B < 0, -math.inf, chosen_B))
    adapter.train(was_training)
    return torch.cat(parts)


def _batches(rows: int, batch_rows: int, rng: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(rows, generator=rng).split(batch_rows)


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise NumericalFault("The training loss is not finite.", hint="Try a smaller --learning-rate.")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
