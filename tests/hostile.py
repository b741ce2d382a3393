"""Good files damaged by a failing disk or an attacker, and the rule for their readers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from protocol.errors import PemaError

DEEP = "[" * 100_000
HUGE = 10**400
# What a number, a text or a list of a JSON file may be replaced by.
hostile: st.SearchStrategy[Any] = st.sampled_from(
    [
        0,
        -1,
        1,
        7,
        2**31,
        2**40,
        2**63,
        HUGE,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "../x",
        "/etc/passwd",
        None,
        True,
        [],
        {},
    ]
) | st.lists(st.integers(-1, 2**62), max_size=3)
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X", ""]

Draw = Callable[[st.SearchStrategy[Any]], Any]


def refused(read: Callable[[], Any]) -> Any:
    """The value that was read; None if the reader refused it with a typed error."""
    try:
        return read()
    except PemaError as error:
        refusal = error
    assert refusal.hint
    assert len(str(refusal)) < 1000
    return None


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut off, changed in some bits, or with bytes put in."""
    changed = bytearray(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    for _ in range(draw(st.integers(0 if len(changed) < len(data) else 1, 3))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        if changed and draw(st.booleans()):
            changed[at] ^= 1 << draw(st.integers(0, 7))
        else:
            changed[at:at] = draw(st.binary(min_size=1, max_size=9))
    return bytes(changed)


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """JSON with one value somewhere in it replaced, removed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        name = draw(st.sampled_from(sorted(value)))
        return value | {name: draw(altered(value[name]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(altered(value[at])), *value[at + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        gone = draw(st.sampled_from(sorted(value)))
        return {name: inner for name, inner in value.items() if name != gone}
    return draw(hostile)


@st.composite
def crooked(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors container whose header lies: of dtypes, shapes, offsets, or its own length."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    entry = header[name]
    kind = draw(st.sampled_from(["dtype", "shape", "data_offsets", "rename", "json", "length"]))
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind in ("shape", "data_offsets"):
        entry[kind] = draw(altered(entry[kind]))
    elif kind == "rename":
        header[draw(st.sampled_from(["", "x", "cr_N_D", "rng", "optimiser.x.y", "A.weight", "weight_N_D"]))] = (
            header.pop(name)
        )
    elif kind == "json":
        header = draw(altered(header))
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])) if kind == "length" else len(text)
    return struct.pack("<Q", length) + text + data[8 + size :]


@st.composite
def tensors_like(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, one of them with another value, dtype or shape, or gone."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name].clone()
    kind = draw(st.sampled_from(["value", "dtype", "longer", "shorter", "flat", "deeper", "gone"]))
    if kind == "value" and tensor.numel():
        place = draw(st.integers(0, tensor.numel() - 1))
        values = [float("nan"), float("inf"), -1.0] if tensor.is_floating_point() else [-1, 0, 99, 127]
        tensor.view(-1)[place] = draw(st.sampled_from(values)) if tensor.dtype != torch.uint8 else 9
    elif kind == "dtype":
        tensor = tensor.to(draw(st.sampled_from([torch.float64, torch.float16, torch.int64, torch.int8, torch.bool])))
    elif kind == "longer" and tensor.ndim:
        tensor = torch.cat([tensor, tensor[:1]])
    elif kind == "shorter" and tensor.ndim:
        tensor = tensor[:-1]
    elif kind == "flat":
        tensor = tensor.flatten()
    elif kind == "deeper":
        tensor = tensor[None]
    others = {other: value for other, value in tensors.items() if other != name}
    return others if kind == "gone" else others | {name: tensor.contiguous()}


def stored(draw: Draw, data: bytes) -> bytes:
    """A container that is damaged, lies, or holds other tensors than it should."""
    kind = draw(st.sampled_from(["damaged", "crooked", "tensors"]))
    if kind == "tensors":
        return bytes(safetensors.torch.save(draw(tensors_like(safetensors.torch.load(data)))))
    return bytes(draw(damaged(data) if kind == "damaged" else crooked(data)))


def one_spoilt(draw: Draw, good: Mapping[Path, bytes], tensors: Collection[Path]) -> Path:
    """Put good files back and spoil one of them: which it is.

    Args:
        draw: hypothesis'.
        good: what the files hold.
        tensors: those that are containers; the others are text.
    """
    for each, content in good.items():
        each.write_bytes(content)
    path: Path = draw(st.sampled_from(sorted(good)))
    path.write_bytes((stored if path in tensors else text_like)(draw, good[path]))
    return path


def text_like(draw: Draw, data: bytes) -> bytes:
    """A file of JSON, in one piece or in lines, that is damaged, says something else, or is nested without end."""
    kind = draw(st.sampled_from(["damaged", "altered", "deep"]))
    if kind == "deep":
        return DEEP.encode()
    if kind == "damaged":
        return bytes(draw(damaged(data)))
    parts = [data] if data.startswith(b"{\n") else data.splitlines()
    at = draw(st.integers(0, len(parts) - 1))
    parts[at] = json.dumps(draw(altered(json.loads(parts[at])))).encode()
    return b"\n".join(parts)
