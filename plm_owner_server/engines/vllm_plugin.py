"""What vLLM calls in each of its processes (`vllm.general_plugins` in pyproject.toml)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

END_WITH_SERVER = "PEMA_VLLM_ENDS_WITH"
"""Environment variable with the process id of the server that vLLM's processes belong to."""

_PR_SET_PDEATHSIG = 1


def end_with_the_server() -> None:
    """Let this process end when the one that started it does, however that ends.

    vLLM's own do not notice that a server was killed, and would hold its GPUs for ever.
    """
    server = os.environ.get(END_WITH_SERVER)
    if server is None or server == str(os.getpid()) or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    orphaned = os.getppid() == 1 and int(server) != 1
    if orphaned:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
