"""Work of a comparison in a child process, which ends with the process that waits for it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.unguarded("no server")


def test_work_in_a_process_of_its_own_ends_with_the_process_that_waits_for_it(tmp_path: Path) -> None:
    program = """
import sys
from tests.processes.test_subprocess_work import note_and_sleep
from data_owner_client.evaluation.comparison.runner import run_in_subprocess
if __name__ == "__main__":
    run_in_subprocess(note_and_sleep, sys.argv[1])
"""
    (tmp_path / "waits.py").write_text(program)
    noted = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, tmp_path / "waits.py", noted], env=environment) as waiting:
        deadline = time.monotonic() + 120
        while not (noted.exists() and noted.read_text()):
            assert waiting.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        working = psutil.Process(int(noted.read_text()))
        waiting.kill()
    while working.is_running() and working.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def note_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)
