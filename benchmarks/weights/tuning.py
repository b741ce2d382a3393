"""Training of a model's weights on the targets of pairs, for all systems that train weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from data_owner_client.memory.tokenized_pairs import TokenizedPair
from plm_owner_server.engines.model_files.config import head_from_config, linear_head

_BATCH = 16
# Tokens, padding included, whose gradients are computed at once. Fewer need less memory; the sum is equal.
_TOKENS_AT_ONCE = 1024
# Batches whose examples are sorted by length together, so that little is padding.
_POOL_BATCHES = 32
_WARM_UP_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """Settings of a training.

    Attributes:
        rates: learning rates, of which the one with the lowest validation loss after a short training is used.
        epochs: passes over the examples.
        probe_examples: examples of the short trainings.
        probe_held_out: validation examples of the short trainings.
    """

    rates: Sequence[float]
    epochs: int = 2
    probe_examples: int = 400
    probe_held_out: int = 100


@dataclass(frozen=True)
class TuningReport:
    """Result of a training.

    Attributes:
        rate: learning rate.
        probes: validation loss after the short training with each rate, in nats per token.
        losses: validation loss after each epoch, in nats per token; the weights are those of the lowest.
        seconds: duration of the training, without the short ones.
    """

    rate: float
    probes: dict[float, float]
    losses: list[float]
    seconds: float


class Tuner:
    """Trains the weights of a model that require gradients, with AdamW on a linear schedule.

    Args:
        model: causal language model in float32.
        scratch: folder for copies of the weights.
    """

    def __init__(self, model: PreTrainedModel, scratch: Path) -> None:
        self._model = model
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._untrained, self._best = (scratch / f"{name}.safetensors" for name in ("untrained", "best"))
        scratch.mkdir(parents=True, exist_ok=True)
        # The weights stay in float32. Where the CPU has bfloat16, its products take two thirds of the time.
        self._bfloat16 = torch.cpu._is_avx512_bf16_supported()
        self._save(self._untrained)

    def tune(
        self, examples: Sequence[TokenizedPair], held_out: Sequence[TokenizedPair], settings: TuningSettings
    ) -> TuningReport:
        """Choose the learning rate, train, and leave the weights of the best epoch in the model."""
        probes = {}
        for rate in settings.rates if len(settings.rates) > 1 else ():
            probe, probe_held_out = examples[: settings.probe_examples], held_out[: settings.probe_held_out]
            probes[rate] = self.train(probe, probe_held_out, rate, 1)[-1]
        rate = min(probes, key=lambda each: probes[each], default=settings.rates[0])
        started = time.perf_counter()
        losses = self.train(examples, held_out, rate, settings.epochs)
        return TuningReport(rate, probes, losses, time.perf_counter() - started)

    def train(
        self, examples: Sequence[TokenizedPair], held_out: Sequence[TokenizedPair], rate: float, epochs: int
    ) -> list[float]:
        """Train from the start and use the weights of the best epoch. Return the validation loss after each epoch."""
        self._load(self._untrained)
        torch.manual_seed(0)
        optimiser = torch.optim.AdamW(self._weights.values(), lr=rate, fused=True)
        steps = math.ceil(len(examples) / _BATCH) * epochs
        warm_up = max(1, round(steps * _WARM_UP_SHARE))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / warm_up) * max(0.0, 1 - step / steps)
        )
        losses = list[float]()
        for epoch in range(epochs):
            self._model.train()
            for batch in _shuffled(examples):
                optimiser.zero_grad(set_to_none=True)
                tokens = sum(len(example.target) for example in batch)
                for part in _parts(batch):
                    (-self._logprobs(part).sum() / tokens).backward()
                optimiser.step()
                schedule.step()
            losses.append(self.loss(held_out))
            print(f"rate {rate}: validation loss {losses[-1]:.4f}", flush=True)
            if losses[-1] == min(losses) and epoch + 1 < epochs:
                self._save(self._best)
        if losses[-1] != min(losses):
            self._load(self._best)
        return losses

    @torch.no_grad()
    def loss(self, examples: Sequence[TokenizedPair]) -> float:
        """Mean negative log-likelihood of the targets' tokens, in nats."""
        self._model.eval()
        in_order = sorted(examples, key=_length)
        return -torch.cat([self._logprobs(part) for part in _parts(in_order)]).mean().item()

    def _save(self, path: Path) -> None:
        safetensors.torch.save_file({name: weight.detach() for name, weight in self._weights.items()}, path)

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        for name, weight in safetensors.torch.load_file(path).items():
            self._weights[name].copy_(weight)

    def _logprobs(self, batch: Sequence[TokenizedPair]) -> Tensor:
        """Log-probability of every target token. Logits are computed only at their positions."""
        ids_B_T = torch.zeros(len(batch), max(map(_length, batch)) - 1, dtype=torch.long)
        mask_B_T, is_target_B_T = torch.zeros_like(ids_B_T), torch.zeros_like(ids_B_T, dtype=torch.bool)
        for row, example in enumerate(batch):
            ids = example.prompt + example.target[:-1]
            ids_B_T[row, : len(ids)] = torch.tensor(ids)
            mask_B_T[row, : len(ids)] = 1
            is_target_B_T[row, len(example.prompt) - 1 : len(ids)] = True
        target_N = torch.tensor([token for example in batch for token in example.target])
        output = linear_head(self._model)
        head = head_from_config(self._model.config.get_text_config(), output.weight, output.bias)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            states = self._model.base_model(input_ids=ids_B_T, attention_mask=mask_B_T, use_cache=False)
            logits_N_V = head.logits(states.last_hidden_state[is_target_B_T])
        return -F.cross_entropy(logits_N_V.float(), target_N, reduction="none")


def _length(example: TokenizedPair) -> int:
    return len(example.prompt) + len(example.target)


def _parts(batch: Sequence[TokenizedPair]) -> Iterator[Sequence[TokenizedPair]]:
    """Runs of examples with at most `_TOKENS_AT_ONCE` tokens, padding included, or with one example."""
    part: list[TokenizedPair] = []
    for example in batch:
        if part and max(map(_length, [*part, example])) * (len(part) + 1) > _TOKENS_AT_ONCE:
            yield part
            part = []
        part.append(example)
    if part:
        yield part


def _shuffled(examples: Sequence[TokenizedPair]) -> Iterator[list[TokenizedPair]]:
    """Batches of examples of similar length, in a new random order each time."""
    order = torch.randperm(len(examples)).tolist()
    size = _POOL_BATCHES * _BATCH
    batches = []
    for pool in (order[start : start + size] for start in range(0, len(order), size)):
        pool.sort(key=lambda number: _length(examples[number]))
        batches += [pool[start : start + _BATCH] for start in range(0, len(pool), _BATCH)]
    for at in torch.randperm(len(batches)).tolist():
        yield [examples[number] for number in batches[at]]
