"""Probabilities of the labels of held-out texts in any mixture, from the same calls, and their calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.adapter.trained import TrainedAdapter
from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.decoding.failures import TextFailures
from data_owner_client.decoding.inputs import text_inputs
from data_owner_client.decoding.labels.requests import label_requests
from data_owner_client.decoding.labels.scoring import score_labels
from data_owner_client.decoding.settings import DecodingSettings
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter

CONSTANT_LAMBDAS = tuple(i / 20 for i in range(20))
"""Constant values of λ that are compared; 0 is the PLM alone. At 1, labels that the memory lacks are impossible."""
# Standard deviation of log T before any text: T is about within a factor of two of 1.
_PRIOR_DEVIATION = math.log(2)
# Mixtures between these need hardly any other branches of the tree than they do.
_EXPLORED = tuple(Interpolation(schedule="constant", lambda_max=value) for value in (0.0, 0.25, 0.5, 0.75, 0.95))


@dataclass(frozen=True)
class LabelFit:
    """The probabilities of labels of held-out texts in one mixture.

    Attributes:
        answers: most probable label of each text.
        temperature: temperature of the lowest loss.
        utility_E: log-probability of the right label of each text at this temperature, float64.
    """

    answers: list[str]
    temperature: float
    utility_E: Tensor

    @property
    def nll(self) -> float:
        """Mean negative log-probability of the right label, in nats."""
        return -self.utility_E.mean().item()


class HeldOutLabels:
    """Label scores of held-out texts, computed once for all mixtures.

    Args:
        plm: the PLM.
        task: a `classify` task whose labels are known.
        pairs: held-out pairs.
        adapter: the trained adapter.
        interpolations: mixtures besides those with a constant λ.
        settings: batch size and tolerance.
        reporter: shows the progress.

    Raises:
        PemaError: a call to the PLM failed.
    """

    def __init__(
        self,
        plm: RemotePlm,
        task: Task,
        pairs: Sequence[Pair],
        adapter: TrainedAdapter,
        interpolations: Sequence[Interpolation],
        settings: DecodingSettings,
        reporter: Reporter,
    ) -> None:
        self._labels = task.labels
        sources = [pair.question for pair in pairs]
        failures = TextFailures(sources, None)
        inputs = text_inputs(plm, task, sources, adapter, failures)
        requests, numbers = label_requests(plm, task, sources, inputs, failures)
        failures.settle(len(sources))
        self._scored, _ = score_labels(
            plm,
            requests,
            task.labels,
            adapter=adapter,
            interpolations=[*_EXPLORED, *interpolations],
            settings=settings,
            reporter=reporter,
        )
        number_of = {label: number for number, label in enumerate(task.labels)}
        self._right_E = torch.tensor([number_of[pairs[number].target or ""] for number in numbers])

    def fit(self, interpolation: Interpolation) -> LabelFit:
        """Fit the temperature for a mixture, which takes no further call."""
        logprob_E_L = torch.empty(len(self._right_E), len(self._labels), dtype=torch.float64)
        for group in self._scored:
            logprob_E_L[group.numbers] = group.evidence.label_logprobs(interpolation)
        temperature = fitted_temperature(logprob_E_L, self._right_E)
        calibrated_E_L = (logprob_E_L / temperature).log_softmax(dim=-1)
        return LabelFit(
            answers=[self._labels[label] for label in logprob_E_L.argmax(dim=-1).tolist()],
            temperature=temperature,
            utility_E=calibrated_E_L.gather(1, self._right_E[:, None])[:, 0],
        )


def fitted_temperature(logprob_E_L: Tensor, right_E: Tensor) -> float:
    """Temperature T at which the right labels are likeliest.

    See Guo et al. 2017, On Calibration of Modern Neural Networks.
    A log-normal prior around 1 bounds it where a few texts are all answered rightly. The mean log-probability of the
    right labels is never lower than at T = 1, and no T changes the order of labels.

    Args:
        logprob_E_L: log-probabilities of L labels for E texts, float64; they need not be normalised.
        right_E: int64, index of the right label.
    """
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_t], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        right_E_1 = (logprob_E_L / log_t.exp()).log_softmax(dim=-1).gather(1, right_E[:, None])
        value = (log_t / _PRIOR_DEVIATION).square() / (2 * len(right_E)) - right_E_1.mean()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return math.exp(log_t.item())


def label_settings(context_mode: ContextMode) -> DecodingSettings:
    """Settings of label scoring on held-out texts.

    The owner of the PLM may know these texts from a private memory, but not their labels. So each of them is sent with
    all labels: which labels seem probable is not shown.
    """
    return DecodingSettings(label_tolerance=0.0) if context_mode == "private" else DecodingSettings()
