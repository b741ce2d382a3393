"""A simulated GPU for vLLM's model runner 2 and asynchronous scheduling, where PYTHONPATH has this folder.

Triton's kernels run in its interpreter. Streams and events do nothing, as all work is done at once. It shows which rows
come out, and nothing of speed or of the order of a GPU's work.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "TORCHDYNAMO_DISABLE": "1"}


class _AfterImport(MetaPathFinder):
    """Calls a function with each of some modules once it has been imported."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._changes:
            return None
        change = self._changes.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


class _Stream:
    device = None

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True


def _let_triton_have_a_cpu(module: Any) -> None:
    driver = SimpleNamespace(is_active=lambda: True)
    module.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def _schedule_asynchronously(module: Any) -> None:
    import torch

    torch.cuda.Stream = _Stream  # type: ignore[misc, assignment]
    torch.cuda.Event = torch.Event = _Event  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda *_, **__: _Stream()  # type: ignore[assignment]
    torch.cuda.set_stream = lambda *_, **__: None
    torch.cuda.stream = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]
    check = module.CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    module.CpuPlatform.check_and_update_config = classmethod(check_and_keep)


def _refuse_model_runner_1(module: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("model runner 1 was made on the simulated GPU")

    module.GPUModelRunner.__init__ = refuse


sys.meta_path.insert(
    0,
    _AfterImport(
        {
            "triton.backends": _let_triton_have_a_cpu,
            "vllm.platforms.cpu": _schedule_asynchronously,
            "vllm.v1.worker.gpu_model_runner": _refuse_model_runner_1,
        }
    ),
)
