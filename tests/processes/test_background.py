"""Background work of a program that ends."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unguarded("no server")


def test_a_program_does_not_wait_for_what_nobody_needs() -> None:
    code = (
        "import time; from data_owner_client.runtime.background import daemon_future; "
        "daemon_future(lambda: time.sleep(60))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
