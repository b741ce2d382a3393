"""LoRA trained on the PLM itself with the same pairs: the upper bound, which needs the PLM's weights.

It has rank 16 on all linear layers (peft), prompts without examples, and AdamW with a linear schedule. Of two learning
rates it uses the one with the lower validation loss after a short training. The final weights are those of the best
epoch on the validation pairs. Its scores are shown with those of `pema-client compare`, whose data it uses.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from data_owner_client.data.pairs import Pair
from data_owner_client.data.reading.reader import read_pairs
from data_owner_client.data.tasks import Task, load_task
from data_owner_client.runtime.memory_usage import peak_rss_mb
from plm_owner_server.engines.model_files.sources import resolve
from plm_owner_server.engines.transformers.engine import load_model
from plm_owner_server.settings import DEFAULT_MODEL, ServerSettings

_RATES = (3e-4, 1e-3)
_BATCH = 16
# Sequences of a batch whose gradients are computed at once. Fewer need less memory; the sum is equal.
_AT_ONCE = 4
_GENERATE_AT_ONCE = 25


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its target, which ends with the stop text."""

    prompt: list[int]
    target: list[int]


class Lora:
    """The PLM with low-rank updates, and their training."""

    def __init__(self, task: Task) -> None:
        folder = resolve(DEFAULT_MODEL, ServerSettings(_env_file=None).cache_dir).folder
        base = load_model(folder, device="cpu", dtype="float32")
        self.task = task.model_copy(update={"examples": ()})
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left", split_special_tokens=True)
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(base, config)
        self._untrained = self.weights()
        self._bfloat16 = torch.cpu._is_avx512_bf16_supported()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained weights."""
        return {
            name: copy.deepcopy(value.detach()) for name, value in self.model.named_parameters() if value.requires_grad
        }

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore the weights from a copy."""
        self.model.load_state_dict(weights, strict=False)

    def tokenize(self, pairs: Sequence[Pair]) -> list[Example]:
        """Token ids of prompts and targets, split as at inference."""
        examples = []
        for pair in pairs:
            prompt = self.tokenizer(self._prompt(pair.source))["input_ids"]
            whole = self.tokenizer(f"{self._prompt(pair.source)} {pair.target}{self.task.stop_text}")["input_ids"]
            examples.append(Example(prompt, whole[len(prompt) :]))
        return examples

    def train(self, examples: Sequence[Example], held_out: Sequence[Example], rate: float, epochs: int) -> list[float]:
        """Train from the start and use the weights of the best epoch. Return the validation loss after each epoch."""
        self.set_weights(self._untrained)
        torch.manual_seed(0)
        optimiser = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=rate)
        batches = math.ceil(len(examples) / _BATCH)
        warm_up, total = max(1, batches * epochs // 20), batches * epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / warm_up) * max(0.0, 1 - step / total)
        )
        losses, best = list[float](), self._untrained
        for _ in range(epochs):
            self.model.train()
            for batch in _shuffled(examples):
                optimiser.zero_grad(set_to_none=True)
                tokens = sum(len(example.target) for example in batch)
                for start in range(0, len(batch), _AT_ONCE):
                    # The weights stay in float32. Where the CPU has bfloat16, its products take two thirds of the time.
                    with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
                        loss = -self._logprobs(batch[start : start + _AT_ONCE]).sum() / tokens
                    loss.backward()
                optimiser.step()
                schedule.step()
            losses.append(self.loss(held_out))
            print(f"rate {rate}: validation loss {losses[-1]:.4f}", flush=True)
            if losses[-1] == min(losses):
                best = self.weights()
        self.set_weights(best)
        return losses

    @torch.no_grad()
    def loss(self, examples: Sequence[Example]) -> float:
        """Mean negative log-likelihood of the targets' tokens, in nats."""
        self.model.eval()
        logprobs = [self._logprobs(examples[i : i + _BATCH]) for i in range(0, len(examples), _BATCH)]
        return -torch.cat(logprobs).mean().item()

    @torch.no_grad()
    def translate(self, sources: Sequence[str], max_new_tokens: int = 128) -> list[str]:
        """Greedy translations."""
        self.model.eval()
        texts: dict[int, str] = {}
        order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
        for start in range(0, len(order), _GENERATE_AT_ONCE):
            numbers = order[start : start + _GENERATE_AT_ONCE]
            inputs = self.tokenizer([self._prompt(sources[n]) for n in numbers], return_tensors="pt", padding=True)
            ids = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stop_strings=[self.task.stop_text],
                tokenizer=self.tokenizer,
            )
            answers = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            texts |= {n: text.split(self.task.stop_text)[0].strip() for n, text in zip(numbers, answers, strict=True)}
        return [texts[number] for number in range(len(sources))]

    def _prompt(self, source: str) -> str:
        return f"{self.task.instruction}\n\n{self.task.source_label}: {source}\n{self.task.target_label}:"

    def _logprobs(self, batch: Sequence[Example]) -> Tensor:
        """Log-probability of every target token. Logits are computed only at their positions."""
        longest = max(len(e.prompt) + len(e.target) for e in batch) - 1
        ids_B_T = torch.zeros(len(batch), longest, dtype=torch.long)
        mask_B_T, is_target_B_T = torch.zeros_like(ids_B_T), torch.zeros_like(ids_B_T, dtype=torch.bool)
        for row, example in enumerate(batch):
            ids = example.prompt + example.target[:-1]
            ids_B_T[row, : len(ids)] = torch.tensor(ids)
            mask_B_T[row, : len(ids)] = 1
            is_target_B_T[row, len(example.prompt) - 1 : len(ids)] = True
        base = self.model.get_base_model()
        hidden_B_T_D = base.model(input_ids=ids_B_T, attention_mask=mask_B_T, use_cache=False).last_hidden_state
        logits_N_V = base.lm_head(hidden_B_T_D[is_target_B_T])
        target_N = torch.tensor([token for example in batch for token in example.target])
        return -F.cross_entropy(logits_N_V.float(), target_N, reduction="none")


def main() -> None:
    """Choose the rate, train, translate, and write the row of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train.jsonl, validation.jsonl, test.jsonl and task.toml")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the row")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--probe-pairs", type=int, default=400, help="pairs of the short trainings that choose the rate"
    )
    arguments = parser.parse_args()
    splits = {name: read_pairs(arguments.data / f"{name}.jsonl") for name in ("train", "validation", "test")}
    lora = Lora(load_task(arguments.data / "task.toml"))
    train, held_out = lora.tokenize(splits["train"]), lora.tokenize(splits["validation"])
    probes = {rate: lora.train(train[: arguments.probe_pairs], held_out[:100], rate, 1)[-1] for rate in _RATES}
    rate = min(probes, key=lambda r: probes[r])
    started = time.perf_counter()
    losses = lora.train(train, held_out, rate, arguments.epochs)
    seconds = time.perf_counter() - started
    row = {
        "name": "lora",
        "what": "LoRA trained on the PLM itself, which needs its weights",
        "texts": lora.translate([pair.source for pair in splits["test"]]),
        "ppl": math.exp(lora.loss(lora.tokenize(splits["test"]))),
        "train_seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
        "details": {
            "learning_rate": rate,
            "probes": probes,
            "validation_nll": losses,
            "seconds_per_epoch": seconds / arguments.epochs,
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(row, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _shuffled(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Batches of examples of similar length, in a new random order each time."""
    order = torch.randperm(len(examples)).tolist()
    pools = (order[start : start + 32 * _BATCH] for start in range(0, len(order), 32 * _BATCH))
    batches = []
    for pool in pools:
        pool.sort(key=lambda number: len(examples[number].prompt) + len(examples[number].target))
        batches += [pool[start : start + _BATCH] for start in range(0, len(pool), _BATCH)]
    for at in torch.randperm(len(batches)).tolist():
        yield [examples[number] for number in batches[at]]


if __name__ == "__main__":
    main()
