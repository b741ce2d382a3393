"""The machine that the parts run on, its clock and its memory; and the way in which parts report."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

FIGURES = "figures: "
"""Begin of a line of a part's output that holds figures as JSON."""
_MIB = 2**20


@dataclass(frozen=True)
class Machine:
    """A GPU, or a CPU that stands in for one.

    Attributes:
        device: device that everything runs on.
        dtype: dtype of the models: bfloat16 on a GPU, float32 on a CPU.
        quick: run tiny shapes.
        folder: folder for logs and profiles.
    """

    device: torch.device
    dtype: torch.dtype
    quick: bool
    folder: Path

    @classmethod
    def from_arguments(cls) -> Machine:
        """The machine that a part's command line names."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--folder", type=Path, required=True)
        arguments = parser.parse_args()
        has_gpu = torch.cuda.is_available()
        return cls(
            torch.device("cuda" if has_gpu else "cpu"),
            torch.bfloat16 if has_gpu else torch.float32,
            arguments.quick,
            arguments.folder,
        )

    @property
    def has_gpu(self) -> bool:
        """True if there is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the GPU has done its work."""
        if self.has_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], *, rounds: int = 5) -> float:
        """Median duration of some work, in seconds, after a round that is not counted."""
        durations = []
        for _ in range(2 if self.quick else 1 + rounds):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            durations.append(time.perf_counter() - started)
        return median(durations[1:])

    def peak_mb(self, work: Callable[[], object]) -> float | None:
        """Most GPU memory of tensors at any time of some work, in 10⁶ bytes; None without a GPU."""
        if not self.has_gpu:
            work()
            return None
        gc.collect()  # what came before, cycles included
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e6

    def copy_bytes_per_s(self) -> float:
        """Bytes that the device's memory reads and writes a second, measured by a large copy."""
        source = torch.randn((1 if self.quick else 1024) * _MIB, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source), rounds=10)


def record(figures: dict[str, Any]) -> None:
    """Report figures of a part as soon as they are there, so that what follows cannot lose them."""
    print(FIGURES + json.dumps(figures), flush=True)
