"""The log of a server, its own lines and those of libraries, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unguarded("no server")

_PROGRAM = """
import asyncio, logging, sys, threading, warnings
from plm_owner_server.operations.call_log import CallRecord, CallRecorder
from plm_owner_server.logs import redact_task_exceptions, set_up_logs
from transformers.utils import logging as transformers_logging

set_up_logs("debug", sys.argv[1])
with CallRecorder().record(CallRecord("encode", "rest", "POST /v1/encode", "id-1")) as call:
    call.usage.tokens, call.usage.rows, call.outcome, call.status = 5, 3, "overloaded", "429"

def fail():
    try:
        raise ValueError("GEHEIM")
    except ValueError as error:
        raise RuntimeError(f"no luck with {error}") from error

logging.getLogger("uvicorn.error").info("Shutting down", extra={"color_message": "in colours"})
transformers_logging.get_logger("transformers.any").warning("of a library")
warnings.warn("of a module")
try:
    fail()
except RuntimeError:
    logging.getLogger("some.library").exception("It failed.")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
logging.getLogger("some.library").info("%d", "GEHEIM")

async def work():
    redact_task_exceptions(asyncio.get_running_loop())
    task = asyncio.ensure_future(asyncio.to_thread(fail))
    await asyncio.wait([task])
    del task

asyncio.run(work())
fail()
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_all_lines_have_the_form_and_no_exception_is_quoted(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, form], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not done.stdout
    assert "GEHEIM" not in done.stderr
    assert "no luck" not in done.stderr
    if form == "text":
        assert "INFO plm_owner_server.operations.call_log: id-1 POST /v1/encode -> 429 in " in done.stderr
        assert done.stderr.count("in fail\n") == 8  # four failures, each of two exceptions
        assert "\nRuntimeError\n" in done.stderr
        return
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    (call,) = [line for line in lines if line.get("request_id")]
    assert {name: call[name] for name in ("request_id", "call", "transport", "outcome", "status")} == {
        "request_id": "id-1",
        "call": "encode",
        "transport": "rest",
        "outcome": "overloaded",
        "status": "429",
    }
    assert (call["tokens_in"], call["rows_out"], call["level"]) == (5, 3, "INFO")
    assert {"ms", "queue_ms", "compute_ms", "time", "message"} <= set(call)
    loggers = [line["logger"] for line in lines]
    assert {"uvicorn.error", "transformers.any", "py.warnings", "some.library", "plm_owner_server.logs"} <= set(loggers)
    assert loggers.count("plm_owner_server.logs") == 3  # of the thread, the task, and at last
    failures = [line["exc_info"] for line in lines if "exc_info" in line]
    assert len(failures) == 4
    assert all(failure.startswith("RuntimeError\n") and "\nValueError\n" in failure for failure in failures)
    assert "color_message" not in done.stderr
