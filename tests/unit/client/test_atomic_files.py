"""Output folders are checked before the work, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from data_owner_client import train
from data_owner_client.runtime.atomic_files import require_writable
from data_owner_client.training.sweep import Grid, sweep
from protocol.errors import InvalidData


def test_a_check_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize(
    "work",
    [
        lambda plm, memory, folder: train(plm, memory, folder),
        lambda plm, *paths: sweep(plm, paths[0], Grid(), paths[1]),
    ],
    ids=["train", "sweep"],
)
def test_a_folder_that_cannot_be_written_is_named_before_the_work(work: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plm = Mock(spec=[])  # any use of it fails
    with pytest.raises(InvalidData, match="file/adapter cannot be written"):
        work(plm, tmp_path / "memory", tmp_path / "file" / "adapter")
