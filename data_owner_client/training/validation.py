"""Held-out rows, the likelihood of their targets under the mixture, and the likeliest interpolations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.ensemble import AdapterNetwork
from data_owner_client.adapter.interpolation import Interpolation, mix
from data_owner_client.adapter.types import Schedule
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.training.batches import Batch
from protocol.head import LMHead

LAMBDAS = (*(i / 20 for i in range(1, 20)), 0.97, 0.99)
"""Values of λ_max that are compared. At 1, tokens that are no candidates would be impossible."""


@dataclass(frozen=True)
class ValidationData:
    """Held-out rows with the PLM's likelihood of their targets and the inputs of a λ schedule.

    Attributes:
        data: the rows whose contexts match the true ones.
        plm_logprob_N: log P_PLM(y) of each row, float64.
        position_N: position t of each row in its target, int64.
        expected_length_N: SL, the expected length of each row's target in tokens, float64.
    """

    data: Batch
    plm_logprob_N: Tensor
    position_N: Tensor
    expected_length_N: Tensor

    @classmethod
    def from_rows(
        cls, rows: MemoryRows, candidate_ids_C: Tensor, plm_logprob_N: Tensor, length_ratio: float
    ) -> ValidationData:
        """The rows whose contexts match the true ones.

        Args:
            rows: N held-out rows.
            candidate_ids_C: int64, sorted.
            plm_logprob_N: log P_PLM(y) of each row, float64.
            length_ratio: target tokens per source token in the training memory.
        """
        expected_length_E = (rows.source_tokens_E.double() * length_ratio).clamp(min=1.0)
        expected_length_N = expected_length_E.repeat_interleave(rows.rows_E.long())
        data = Batch.from_rows(rows, candidate_ids_C)
        matches_N = data.matches_N
        return cls(
            data[matches_N], plm_logprob_N[matches_N], rows.position_N()[matches_N], expected_length_N[matches_N]
        )

    def mixture_nll(self, pema_logprob_N: Tensor, interpolation: Interpolation) -> float:
        """Mean of −log((1 − λ_t)·P_PLM(y) + λ_t·P_PEMA(y)), in nats per token."""
        lambda_N = interpolation.lambdas(self.position_N, self.expected_length_N)
        return -mix(self.plm_logprob_N, pema_logprob_N, lambda_N).mean().item()

    def best(self, pema_logprob_N: Tensor, schedule: Schedule) -> tuple[Interpolation, float]:
        """The likeliest interpolation with this schedule, and its loss in nats per token."""
        interpolations = [Interpolation(schedule=schedule, lambda_max=value) for value in LAMBDAS]
        return min(
            ((each, self.mixture_nll(pema_logprob_N, each)) for each in interpolations), key=lambda pair: pair[1]
        )


def likeliest_interpolations(validation: ValidationData, pema_logprob_N: Tensor) -> list[Interpolation]:
    """The likeliest interpolation of each schedule on held-out rows."""
    schedules: tuple[Schedule, ...] = ("constant", "linear", "gradual")
    return [validation.best(pema_logprob_N, schedule)[0] for schedule in schedules]


@torch.inference_mode()
def target_logprobs(adapter: AdapterNetwork, head: LMHead, data: Batch) -> Tensor:
    """log P_PEMA(y) of each row, float64; −∞ where the target is no candidate."""
    was_training = adapter.training
    adapter.eval()
    parts = []
    rows, device = head.rows_per_chunk(), head.weight_V_D.device
    for start in range(0, len(data), rows):
        part = data[start : start + rows]
        logprob_B_C = adapter.logprobs(
            head, part.cr_N_D.to(device), part.previous_N_P.to(device), part.matches_N.to(device)
        )
        target_B = logprob_B_C.gather(1, part.label_N.clamp(min=0).to(device)[:, None])[:, 0].double().cpu()
        parts.append(torch.where(part.label_N < 0, -math.inf, target_B))
    adapter.train(was_training)
    return torch.cat(parts)
