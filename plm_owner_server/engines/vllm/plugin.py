"""What vLLM calls in its processes: at their start (`vllm.general_plugins` in pyproject.toml), and for their log."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

END_WITH_SERVER = "PEMA_VLLM_ENDS_WITH"
"""Environment variable with the process id of the server that vLLM's processes belong to."""

LOG_FORMAT = "PEMA_VLLM_LOG_FORMAT"
"""Environment variable with the form of its lines, as for `set_up_logs`."""

_PR_SET_PDEATHSIG = 1


def lines() -> logging.Formatter:
    """How its log is written (vllm_logs.json): as the server's, which quotes no exceptions."""
    from plm_owner_server.logs import formatter

    return formatter("json" if os.environ.get(LOG_FORMAT) == "json" else "text")


def end_with_the_server() -> None:
    """Let this process end when the one that started it does, however that ends, and not before.

    vLLM's own do not notice that a server was killed, and would hold its GPUs for ever; and they end at once at a
    Ctrl-C that the server, too, gets, which then has calls to finish with them.
    """
    server = os.environ.get(END_WITH_SERVER)
    if server is None or server == str(os.getpid()) or not sys.platform.startswith("linux"):
        return
    os.setpgid(0, 0)  # a terminal interrupts all processes of a group
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    orphaned = os.getppid() == 1 and int(server) != 1
    if orphaned:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
