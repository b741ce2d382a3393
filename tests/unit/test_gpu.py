"""The benchmark on a GPU: its reading of traces, and parts that fail or take too long."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.machine import FIGURES, Machine
from benchmarks.gpu.models import SHAPES, random_model, state_bytes_of_a_token, weight_bytes_of_a_step
from benchmarks.gpu.trace import read_events, traced
from plm_owner_server.engines.transformers.kv_cache import AlignedCache


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(torch.device("cpu"), torch.float32, quick=True, folder=tmp_path)


def event(cat: str, name: str, start: float, duration: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "args": args}


def test_a_trace_tells_computing_gaps_copies_and_waits() -> None:
    events = [
        {"ph": "M", "name": "process_name"},  # has no duration
        event("kernel", "second", 140, 10),
        event("kernel", "first", 100, 20),
        event("kernel", "beside the first", 110, 20),  # on another stream, to 130
        event("kernel", "within it", 112, 5),
        event("kernel", "last", 200, 50),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 250, 5, bytes=4096),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 90, 5, bytes=77),
        event("cuda_runtime", "cudaEventSynchronize", 150, 100),
        event("cuda_runtime", "cudaLaunchKernel", 90, 4),
    ]
    trace = read_events(events, 400e-6)
    assert trace.computing_seconds == pytest.approx(90e-6)  # 100-130, 140-150 and 200-250
    assert trace.figures()["gpu_computes_share"] == pytest.approx(90 / 400)
    assert [(round(1e6 * gap.seconds), gap.after, gap.before) for gap in trace.gaps] == [
        (50, "second", "last"),
        (10, "beside the first", "second"),
    ]
    assert (trace.kernels, trace.copies_to_host, trace.bytes_to_host) == (5, 1, 4096)
    assert trace.waits == 1
    assert trace.waiting_seconds == pytest.approx(100e-6)
    assert "second -> last" in trace.text("a title")


def test_work_without_a_gpu_has_a_trace_without_kernels(machine: Machine) -> None:
    trace = traced(machine, lambda: torch.ones(20, 20) @ torch.ones(20, 20))
    assert trace.seconds > 0
    assert (trace.kernels, trace.gaps) == (0, [])
    assert "aten::mm" in trace.text("a product")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_of_a_step_are_those_of_the_model(shape: str, machine: Machine) -> None:
    model = random_model(shape, machine)
    read = {id(module.weight): module.weight for module in model.modules() if hasattr(module, "weight")}
    biases = [bias for name, bias in model.named_parameters() if name.endswith("bias")]
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings().weight
    unread = [weight for weight in embeddings[:1] if weight is not head]
    every = sum(weight.nbytes for weight in [*read.values(), *biases]) - sum(weight.nbytes for weight in unread)
    assert weight_bytes_of_a_step(model) == every
    assert state_bytes_of_a_token(model) == _cached_bytes(model, 6) / 6


@torch.inference_mode()
def _cached_bytes(model: PreTrainedModel, tokens: int) -> int:
    cache = AlignedCache()
    model.base_model(input_ids=torch.arange(3, 3 + tokens)[None], past_key_values=cache, use_cache=True)
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def _part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, *, seconds: float = 60) -> dict[str, Any]:
    """The figures of a part with this code."""
    (tmp_path / "part.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(gpu, "_command", lambda part, folder, quick: [sys.executable, str(tmp_path / "part.py")])
    monkeypatch.setattr(gpu, "_QUICK_LIMIT", seconds)
    return gpu._run("part", tmp_path, quick=True)


def test_figures_of_a_part_that_fails_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [json.dumps(each) for each in ({"a": {"b": 1}}, {"a": {"c": 2}})]
    code = "\n".join([*(f"print({FIGURES!r} + {line!r})" for line in lines), "print('noise')", "1 / 0"])
    figures = _part(monkeypatch, tmp_path, code)
    assert figures["a"] == {"b": 1, "c": 2}
    assert figures["outcome"].startswith("failed with status 1")


def test_a_part_that_takes_too_long_is_ended_with_its_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = f"""
import subprocess, sys
print({FIGURES!r} + '{{"a": 1}}', flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""
    figures = _part(monkeypatch, tmp_path, code, seconds=5)
    assert figures["outcome"] == "out of time"
    assert figures["a"] == 1
