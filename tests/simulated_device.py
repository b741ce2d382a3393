"""A CUDA device that is simulated on the CPU, to count launches and synchronisations of code that runs on it.

Its tensors say that they are on `cuda:0`, and hold their values on the host. Each operation on them runs there, and is
counted as CUDA would run it: as a launch, or as one after which the host waits. A copy between the device and pinned
memory lets the host go on, if it is not blocking. There is one stream: what began earlier has ended earlier.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

DEVICE = torch.device("cuda", 0)
# Operations whose result the host must have before it goes on, such as the number of rows that a mask selects.
_WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_"}
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# Its parts depend on the device that it is called for.
_WHOLE = {"scaled_dot_product_attention"}


class DeviceTensor(Tensor):
    """A tensor on the simulated device.

    Attributes:
        host: its values.
    """

    host: Tensor
    # __torch_dispatch__ sees all that is computed.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("meta"),  # what C++ sees: a device that needs no driver
        )
        made.host = host
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} was called on the device outside of `with SimulatedDevice(…)`")


class _Event:
    """`torch.cuda.Event` of the device."""

    device: SimulatedDevice

    def record(self, stream: object) -> None:
        self.device.recorded += 1
        self._number = self.device.recorded

    def query(self) -> bool:
        return self._number <= self.device.passed

    def synchronize(self) -> None:
        self.device.waits["event"] += 1
        self.device.passed = max(self.device.passed, self._number)


class SimulatedDevice(TorchDispatchMode):
    """The device, while it is entered.

    Attributes:
        launches: number of launches by operation.
        waits: number of times that the host waited for the device, by the operation that it waited in.
        bytes_to_host: bytes that were copied to the host.
        recorded: number of events that were recorded.
        passed: number of the newest event that the host has waited for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pinned = dict[int, Tensor]()  # by address; the tensors, so that no other gets their memory
        self._lifting = list[bool]()
        self.recorded = self.passed = 0
        self.clear()
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", type("Event", (_Event,), {"device": self}))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(Tensor, "pin_memory", lambda host: self._pin(host.clone()))

    def __enter__(self) -> SimulatedDevice:
        # `torch.tensor(…, device=…)` then makes its tensor on the host and copies it, which is seen here.
        self._lifting.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifting.pop())

    def clear(self) -> None:
        """Start the counts again."""
        self.launches, self.waits, self.bytes_to_host = Counter[str](), Counter[str](), 0

    def adopt(self, module: nn.Module) -> None:
        """Move a module's weights and buffers to the device."""
        for part in module.modules():
            tables: list[dict[str, Any]] = [part._parameters, part._buffers]
            for held in tables:
                for name, value in held.items():
                    if value is not None:
                        held[name] = DeviceTensor(value.detach())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        if composite and _name(func) not in _WHOLE:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(func, _name(func), args, kwargs)

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        there = [each for each in tree_iter((args, kwargs)) if isinstance(each, DeviceTensor)]
        target = kwargs.get("device")
        # C++ makes tensors beside those of the device on the one that it sees.
        to_device = torch.device(target).type in (DEVICE.type, "meta") if target is not None else bool(there)
        if name == "_to_copy" and there and to_device and kwargs.get("dtype") in (None, there[0].dtype):
            return there[0]
        if name in _COPIES:
            self._count_copy(
                args, kwargs, to_device=to_device if name == "_to_copy" else isinstance(args[0], DeviceTensor)
            )
        elif there or to_device:
            self._count(func, name, args)
        pins = kwargs.pop("pin_memory", False)
        if to_device and target is not None:
            kwargs["device"] = torch.device("cpu")
        host_args, host_kwargs = tree_map_only(DeviceTensor, lambda each: each.host, (args, kwargs))
        result = func(*host_args, **host_kwargs)
        if func._schema.is_mutable and name.endswith("_"):
            return args[0]
        if pins:
            return self._pin(result)
        return tree_map_only(Tensor, DeviceTensor, result) if to_device else result

    def _count(self, func: Any, name: str, args: Any) -> None:
        indices = [each for each in tree_iter(args[1:2]) if isinstance(each, Tensor)] if name in _INDEXING else []
        # The indices under a mask are counted first; those on the host are copied.
        if name in _WAITING or any(
            each.dtype in (torch.bool, torch.uint8) or not isinstance(each, DeviceTensor) for each in indices
        ):
            self.waits[name] += 1
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and name not in _NO_LAUNCH:
            self.launches[name] += 1

    def _count_copy(self, args: Any, kwargs: dict[str, Any], *, to_device: bool) -> None:
        """Count a copy: `_to_copy(source, …)`, or `copy_(target, source, non_blocking)`."""
        in_place = len(args) > 1
        source = args[1] if in_place else args[0]
        from_device = isinstance(source, DeviceTensor)
        if not source.numel() or not (from_device or to_device):
            return
        self.launches["copy"] += 1
        if from_device and to_device:
            return
        self.bytes_to_host += source.host.nbytes if from_device else 0
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        on_host = source if to_device else args[0] if in_place else None
        if on_host is None or not non_blocking or on_host.untyped_storage().data_ptr() not in self._pinned:
            self.waits["copy"] += 1

    def _pin(self, host: Tensor) -> Tensor:
        self._pinned[host.untyped_storage().data_ptr()] = host
        return host


def _name(func: Any) -> str:
    return str(func._schema.name).partition("::")[2]
