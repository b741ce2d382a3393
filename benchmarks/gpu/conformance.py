"""The engine's tests and those of the wire on the GPU, with tiny models in float32 and in bfloat16."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec

from benchmarks.gpu import stand_ins
from benchmarks.gpu.machine import Machine, record

# Arguments of each run of the tests, by the name of its figures.
_RUNS = {
    "engine_float32": ["tests/unit/server/test_transformers_engine.py", "tests/unit/server/test_ffn_output.py"],
    "engine_bfloat16": ["tests/unit/server/test_bfloat16.py"],
    "wire": ["tests/wire/test_bfloat16.py", "tests/wire/test_service.py"],
    "reference_float32": ["tests/wire/test_against_reference.py", "-k", "teacher_forced or token_for_token"],
}
_QUICK = {
    "engine_float32": ["-k", "llama and decode"],
    "wire": ["-k", "encode or decode or bfloat16"],
    "reference_float32": ["-k", "teacher_forced"],
}
_WORKERS = 6


def main() -> None:
    """Run the tests, the most telling first."""
    machine = Machine.from_arguments()
    options = ["-q", "-p", "no:cacheprovider", "-p", stand_ins.__name__, "-m", "not slow"]
    options += ["--device", machine.device.type]
    # Warnings of other versions of torch and transformers than the pinned ones are no faults of ours.
    options += ["-W", "default", *(["-n", str(_WORKERS)] if machine.has_gpu and find_spec("xdist") else [])]
    for name, arguments in _RUNS.items():
        if not name.startswith("engine") and (lacking := _lacking_for_transports()):
            record({name: {"not_run": lacking}})
            continue
        chosen = _QUICK.get(name, []) if machine.quick else []
        command = [sys.executable, "-m", "pytest", *options, *arguments, *chosen]
        log = machine.folder / f"tests-{name}.txt"
        with log.open("w", encoding="utf-8") as output:  # so that it is there, too, if the time runs out
            environment = os.environ | {"PEMA_TEST_PROFILE": "fast"}
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        record({name: _summary(log.read_text(encoding="utf-8")) | {"exit_status": status}})


def _lacking_for_transports() -> str:
    """The reason why no server can be started on this machine; empty if there is none."""
    try:
        importlib.import_module("plm_owner_server.transports.rest_app")
    except ImportError as error:
        return str(error)
    return ""


def _summary(output: str) -> dict[str, object]:
    """Numbers of tests by outcome, and the names of those that failed."""
    lines = output.strip().splitlines()
    counts = {
        kind: int(number)
        for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1] if lines else "")
    }
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {**counts, "failed_tests": failed}


if __name__ == "__main__":
    main()
