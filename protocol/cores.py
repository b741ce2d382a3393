"""Number of CPU cores that this process may use: those of the machine, less what a container takes away.

torch and OpenMP know the affinity of a process, and not the quota of its control group. A container with a quota of 2
CPUs on a machine with 64 cores would get 64 threads, which are stopped for most of the time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

_SELF = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def usable_cores(memberships: Path = _SELF, root: Path = _ROOT) -> int:
    """Number of cores that this process may use, at least 1.

    It is bounded by the affinity of the process and by the CPU quotas (cgroup v1 and v2) of its control group and of
    all groups around it. A part of a core counts as a whole one.

    Args:
        memberships: file in which the kernel names the control groups of this process.
        root: folder of the control groups' files.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(memberships, root))]))


def _quotas(memberships: Path, root: Path) -> Iterator[float]:
    """CPU quotas of the control groups of this process, in cores."""
    for folder in _groups(memberships, root):
        with suppress(OSError, ValueError, ZeroDivisionError):  # no quota, or none that this process may see
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            if quota != "max":
                yield int(quota) / int(period)
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota_us = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
            if quota_us > 0:  # -1 without a quota
                yield quota_us / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))


def _groups(memberships: Path, root: Path) -> Iterator[Path]:
    """Folders of the control groups that may have a CPU quota for this process, the innermost of a hierarchy first.

    In a container that does not see the groups around it, its own group is the root, whatever `memberships` says.
    """
    with suppress(OSError, ValueError):  # no such file, or one of another form
        for line in memberships.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            # Version 1 has a hierarchy for each set of controllers, version 2 a single one at the root.
            bases = (root / controllers, root / "cpu") if controllers else (root,)
            group = PurePosixPath(path.lstrip("/"))
            yield from (base / parent for base in bases for parent in (group, *group.parents))
    yield from (root, root / "cpu", root / "cpu,cpuacct")


def torch_threads(threads: int) -> int:
    """Number of threads that torch shall use.

    Args:
        threads: the user's choice, of which at most the machine's cores count; 0 for all usable cores, or fewer if
            OMP_NUM_THREADS says so.
    """
    # More threads than cores are no faster. Thousands of them, and torch ends the process.
    return min(threads, os.cpu_count() or 1) or min(torch.get_num_threads(), usable_cores())
