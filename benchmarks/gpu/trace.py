"""Traces of some work by torch's profiler: the time that the GPU computes, its idle gaps, copies and waits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.machine import Machine

_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
_GAPS_SHOWN, _ROWS_SHOWN = 8, 20


@dataclass(frozen=True)
class Gap:
    """Time without a kernel.

    Attributes:
        seconds: its length.
        after: the kernel before it.
        before: the kernel after it.
    """

    seconds: float
    after: str
    before: str


@dataclass(frozen=True)
class Trace:
    """Some work as the profiler saw it. Without a GPU all that concerns one is 0.

    Attributes:
        seconds: duration without the profiler.
        computing_seconds: time in which at least one kernel ran.
        kernels: number of launched kernels.
        copies_to_host: number of copies to the host.
        bytes_to_host: bytes that were copied to the host.
        waits: number of times that the host waited for the GPU.
        waiting_seconds: duration of these, in seconds.
        gaps: times without a kernel between two kernels, the longest first.
        table: operations with their times, as text.
    """

    seconds: float
    computing_seconds: float
    kernels: int
    copies_to_host: int
    bytes_to_host: int
    waits: int
    waiting_seconds: float
    gaps: Sequence[Gap]
    table: str = ""

    def figures(self) -> dict[str, float | int]:
        """The figures of a report."""
        return {
            "ms": 1000 * self.seconds,
            "gpu_computes_share": self.computing_seconds / self.seconds,
            "kernels": self.kernels,
            "copies_to_host": self.copies_to_host,
            "bytes_to_host": self.bytes_to_host,
            "waits": self.waits,
            "waiting_ms": 1000 * self.waiting_seconds,
        }

    def text(self, title: str) -> str:
        """A page about what the GPU waits for."""
        lines = [f"== {title}", json.dumps(self.figures()), "", "longest times without a kernel, in microseconds:"]
        lines += [
            f"{1e6 * gap.seconds:10.1f}  {gap.after[:60]} -> {gap.before[:60]}" for gap in self.gaps[:_GAPS_SHOWN]
        ]
        return "\n".join([*lines, "", self.table, ""])


def traced(machine: Machine, work: Callable[[], object], *, rounds: int = 5) -> Trace:
    """Time some work without the profiler, then run it once more with it."""
    seconds = machine.seconds(work, rounds=rounds)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.has_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiled:
        work()
        machine.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return read_events(events, seconds, table=_table(machine, profiled.key_averages()))


def read_events(events: Iterable[dict[str, Any]], seconds: float, *, table: str = "") -> Trace:
    """The trace that the events of a Chrome trace tell, whose times are microseconds.

    Args:
        events: the events.
        seconds: duration of the work without the profiler.
        table: operations with their times, as text.
    """
    of_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if "dur" in event:
            of_kind.setdefault(event.get("cat", ""), []).append(event)
    kernels = sorted(of_kind.get("kernel", []), key=lambda event: event["ts"])
    copies = [event for event in of_kind.get("gpu_memcpy", []) if "DtoH" in event["name"]]
    waits = [event for event in of_kind.get("cuda_runtime", []) if event["name"] in _WAITS]
    gaps, computing, ended, last = list[Gap](), 0.0, None, ""
    for kernel in kernels:
        start, end = kernel["ts"], kernel["ts"] + kernel["dur"]
        if ended is not None and start > ended:
            gaps.append(Gap((start - ended) / 1e6, last, kernel["name"]))
        computing += max(0.0, end - max(start, start if ended is None else ended))
        if ended is None or end > ended:
            ended, last = end, kernel["name"]
    return Trace(
        seconds=seconds,
        computing_seconds=computing / 1e6,
        kernels=len(kernels),
        copies_to_host=len(copies),
        bytes_to_host=sum(int(event.get("args", {}).get("bytes", 0)) for event in copies),
        waits=len(waits),
        waiting_seconds=sum(event["dur"] for event in waits) / 1e6,
        gaps=sorted(gaps, key=lambda gap: -gap.seconds),
        table=table,
    )


def _table(machine: Machine, averages: EventList) -> str:
    by = "self_device_time_total" if machine.has_gpu else "self_cpu_time_total"
    return str(averages.table(sort_by=by, row_limit=_ROWS_SHOWN, max_name_column_width=60))
