"""Cores that a process may use: control groups of both versions, made as folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.cores import torch_threads, usable_cores
from tests.profiles import scaled


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cores(folder: Path, memberships: str) -> int:
    write(folder / "self", memberships)
    return usable_cores(folder / "self", folder / "cgroup")


@pytest.mark.parametrize(
    ("quota", "expected"), [("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", 64)]
)
def test_the_quota_of_a_container_counts(quota: str, expected: int, tmp_path: Path) -> None:
    write(tmp_path / "cgroup/cpu.max", f"{quota}\n")
    assert cores(tmp_path, "0::/\n") == expected
    # Docker with the host's namespace of control groups: the path is the host's, and not to be found here.
    assert cores(tmp_path, "0::/system.slice/docker-5f0c.scope\n") == expected


def test_the_smallest_quota_of_the_groups_around_counts(tmp_path: Path) -> None:
    """As systemd's `CPUQuota=` of a unit and of a slice around it."""
    write(tmp_path / "cgroup/pema.slice/pema.service/cpu.max", "max 100000")
    write(tmp_path / "cgroup/pema.slice/cpu.max", "300000 100000")
    assert cores(tmp_path, "0::/pema.slice/pema.service\n") == 3
    write(tmp_path / "cgroup/pema.slice/pema.service/cpu.max", "100000 100000")
    assert cores(tmp_path, "0::/pema.slice/pema.service\n") == 1


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("group", ["", "docker/5f0c"])
def test_version_1_counts(folder: str, group: str, tmp_path: Path) -> None:
    base = tmp_path / "cgroup" / folder / group
    write(base / "cpu.cfs_quota_us", "400000\n")
    write(base / "cpu.cfs_period_us", "100000\n")
    lines = f"12:memory:/docker/5f0c\n4:{folder}:/{group}\n1:name=systemd:/x\n"
    assert cores(tmp_path, lines) == 4
    write(base / "cpu.cfs_quota_us", "-1\n")
    assert cores(tmp_path, lines) == 64


def test_version_1_under_another_name_counts(tmp_path: Path) -> None:
    write(tmp_path / "cgroup/cpu/docker/5f0c/cpu.cfs_quota_us", "300000")
    write(tmp_path / "cgroup/cpu/docker/5f0c/cpu.cfs_period_us", "100000")
    assert cores(tmp_path, "4:cpuacct,cpu:/docker/5f0c\n") == 3


def test_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    write(tmp_path / "cgroup/cpu.max", "800000 100000")
    assert cores(tmp_path, "0::/\n") == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(tmp_path, "0::/\n") == 1


def test_without_control_groups_all_cores_count(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none", tmp_path / "none") == 64


@given(memberships=st.text(), quota=st.text(max_size=20))
@settings(max_examples=scaled(100))
def test_nothing_that_a_kernel_writes_is_a_failure(
    memberships: str, quota: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cores")
    (folder / "cgroup").mkdir()
    (folder / "cgroup/cpu.max").write_text(quota, encoding="utf-8", errors="replace")
    (folder / "self").write_text(memberships, encoding="utf-8", errors="replace")
    assert 1 <= usable_cores(folder / "self", folder / "cgroup") <= 64


def test_torch_gets_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 48)
    monkeypatch.setattr("protocol.cores.usable_cores", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert torch_threads(0) == 2
    assert torch_threads(7) == 7
    assert torch_threads(100_000) == 64  # as many would end the process
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # by OMP_NUM_THREADS
    assert torch_threads(0) == 1
