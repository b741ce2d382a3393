"""Decoding policies: prompts and interpolation to use an adapter with, and the likeliest ones of held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel
from torch import Tensor

from data_owner_client.adapter.gate import Gate, cross_validated_nll
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.memory.rows import MemoryRows
from data_owner_client.training.likelihood import pema_logprobs_and_gate_features
from data_owner_client.training.validation import ValidationData, likeliest_interpolations


class DecodingPolicy(BaseModel):
    """Prompts and interpolation to use an adapter with, and their scores on the held-out pairs.

    Attributes:
        nearest: retrieved examples in each prompt of the PLM; 0 for the examples of the task.
        interpolation: interpolation with the PLM.
        nll: loss of the mixture, in nats per token. A length reward only affects decoding and does not change it.
        scores: scores of decoded texts, by key of the metric; None if this policy was not decoded.
        label_nll: of a `classify` task, mean negative log-probability of the right label among all, in nats; None if
            this policy was not tried on texts.
        label_temperature: temperature of the labels' probabilities that `label_nll` has.
    """

    nearest: int
    interpolation: Interpolation
    nll: float
    scores: dict[str, float] | None = None
    label_nll: float | None = None
    label_temperature: float = 1.0

    def __str__(self) -> str:
        """The policy in words."""
        prompts = f", prompts with {self.nearest} retrieved examples" if self.nearest else ""
        return f"{self.interpolation}{prompts}"

    def with_length_reward(self, length_reward: float) -> DecodingPolicy:
        """A copy with another length reward."""
        return self.model_copy(update={"interpolation": self.interpolation.with_length_reward(length_reward)})


@dataclass(frozen=True)
class PromptVariant:
    """Held-out rows behind one kind of prompt for the PLM.

    Attributes:
        nearest: retrieved examples in each prompt of the PLM; 0 for the examples of the task.
        data: held-out rows with the PLM's likelihood behind these prompts.
        pema_logprob_N: log P_PEMA(y) of each row, float64.
        features_N_F: inputs of a gate for each row.
    """

    nearest: int
    data: ValidationData
    pema_logprob_N: Tensor
    features_N_F: Tensor

    @classmethod
    def from_rows(
        cls, nearest: int, data: ValidationData, adapter: TrainedAdapter, plm_rows: MemoryRows
    ) -> PromptVariant:
        """Compute the adapter's side; `plm_rows` are the rows behind these prompts, with log-sum-exp."""
        return cls(nearest, data, *pema_logprobs_and_gate_features(adapter, data, plm_rows))

    def policy(self, interpolation: Interpolation) -> DecodingPolicy:
        """The policy with an interpolation that has no gate, and its loss."""
        nll = self.data.mixture_nll(self.pema_logprob_N, interpolation)
        return DecodingPolicy(nearest=self.nearest, interpolation=interpolation, nll=nll)

    def likeliest(self, *, gate: bool) -> list[DecodingPolicy]:
        """The policies with the likeliest λ_max of each schedule and, if `gate` is set, with a fitted gate."""
        policies = [self.policy(each) for each in likeliest_interpolations(self.data, self.pema_logprob_N)]
        if gate:
            sides = self.features_N_F, self.data.plm_logprob_N, self.pema_logprob_N
            nll, mean_lambda = cross_validated_nll(*sides, self.data.position_N)
            gated = Interpolation(schedule="constant", lambda_max=mean_lambda, gate=Gate.fit(*sides))
            policies.append(DecodingPolicy(nearest=self.nearest, interpolation=gated, nll=nll))
        return policies
