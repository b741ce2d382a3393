"""P = (1 − λ_t)·P_PLM + λ_t·P_PEMA: the schedules of λ_t."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from data_owner_client.adapter.gate import Gate
from data_owner_client.adapter.types import Schedule


class Interpolation(BaseModel):
    """A schedule of λ over the tokens of one sequence.

    With SL the expected length in tokens and SS = λ_max / SL:

    `gradual`   Gradual Unrolling (PEMA, section 3.3): λ_0 = λ_max; then λ_t = CS_t², CS_t = max(0, λ_max − t·SS)
    `linear`    λ_t = max(0, λ_max − t·SS)
    `constant`  λ_t = λ_max
    `none`      λ_t = 0, the PLM alone

    λ depends only on the sequence's source and the position: not on the batch, nor on a reference text.

    Attributes:
        schedule: one of the four above.
        lambda_max: λ_max, the largest λ.
        gate: predicts λ_t from both distributions at the position; the schedule is then only its forecast. None to use
            the schedule itself.
        length_reward: nats taken from the log-probability of a stop token, wherever λ_t > 0. One stop token competes
            with many continuations that share their mass, so the most probable choices make texts too short (the word
            reward of He et al., AAAI 2016; Murray & Chiang, WMT 2018, arXiv 1808.10006).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: Schedule = "gradual"
    lambda_max: float = Field(default=0.9, ge=0.0, le=1.0)
    gate: Gate | None = None
    length_reward: float = Field(default=0.0, ge=0.0, le=20.0)

    def __str__(self) -> str:
        """The schedule or gate in words."""
        reward = f", length reward {self.length_reward:g}" if self.length_reward else ""
        if self.gate is not None:
            return f"a learned gate (λ {self.lambda_max:.2f} on average){reward}"
        return f"{self.schedule} with λ_max {self.lambda_max:.2f}{reward}"

    def with_length_reward(self, length_reward: float) -> Interpolation:
        """A copy with another length reward."""
        return self.model_copy(update={"length_reward": length_reward})

    def changed(
        self, schedule: Schedule | None = None, lambda_max: float | None = None, length_reward: float | None = None
    ) -> Interpolation:
        """A copy with what is given.

        Another schedule starts from its own λ_max, and both schedule and λ_max replace a gate.

        Args:
            schedule: schedule of λ; None to keep it.
            lambda_max: λ_max; None to keep it.
            length_reward: length reward; None to keep it.
        """
        given = {"lambda_max": lambda_max, "length_reward": length_reward}
        changes = {name: value for name, value in given.items() if value is not None}
        if schedule is None and lambda_max is None:
            return self.model_copy(update=changes)
        same = schedule in (None, self.schedule)
        base = self.model_copy(update={"gate": None}) if same else Interpolation(schedule=schedule or self.schedule)
        return base.model_copy(update=changes)

    def lambdas(self, position_N: Tensor, expected_length_N: Tensor) -> Tensor:
        """λ at each position.

        Args:
            position_N: int64, t counted from 0.
            expected_length_N: SL of each position's sequence, in tokens.

        Returns:
            float64 [N] in [0, 1].
        """
        t_N = position_N.double()
        if self.schedule == "none":
            return torch.zeros_like(t_N)
        if self.schedule == "constant":
            return torch.full_like(t_N, self.lambda_max)
        current_N = (self.lambda_max * (1.0 - t_N / expected_length_N.double())).clamp(min=0.0)
        if self.schedule == "linear":
            return current_N
        return torch.where(position_N == 0, current_N, current_N.square())

    def finished(self, position: int, expected_length: float) -> bool:
        """Return True if λ is 0 from this position to the end, so that the PLM can continue alone."""
        if self.schedule == "none" or self.lambda_max == 0.0:
            return True
        return self.schedule != "constant" and position >= expected_length


def mix(plm_logprob: Tensor, pema_logprob: Tensor, weight: Tensor) -> Tensor:
    """log((1 − λ)·P_PLM + λ·P_PEMA), float64; probabilities of 0 are log-probabilities of −∞."""
    return torch.logaddexp(torch.log1p(-weight) + plm_logprob.double(), torch.log(weight) + pema_logprob.double())
