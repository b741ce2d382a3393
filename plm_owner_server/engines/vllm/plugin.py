"""Functions that vLLM calls in its processes: at start (`vllm.general_plugins` in pyproject.toml) and for logs."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

END_WITH_SERVER = "PEMA_VLLM_ENDS_WITH"
"""Environment variable with the process id of the server that vLLM's processes belong to."""

LOG_FORMAT = "PEMA_VLLM_LOG_FORMAT"
"""Environment variable with the form of log lines, `text` or `json`."""

_PR_SET_PDEATHSIG = 1


def lines() -> logging.Formatter:
    """The formatter of vLLM's log (logging.json): that of the server's log, which quotes no exceptions."""
    from plm_owner_server.logs import formatter

    return formatter("json" if os.environ.get(LOG_FORMAT) == "json" else "text")


def end_with_the_server() -> None:
    """Kill this process when the process that started it ends, and protect it from Ctrl-C.

    Otherwise vLLM's processes would outlive a killed server and hold its GPUs. And a Ctrl-C, which the server gets too,
    would end them before the server has finished its calls with them.
    """
    server = os.environ.get(END_WITH_SERVER)
    if server is None or server == str(os.getpid()) or not sys.platform.startswith("linux"):
        return
    os.setpgid(0, 0)  # a terminal interrupts all processes of its group
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    orphaned = os.getppid() == 1 and int(server) != 1
    if orphaned:  # the server ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
