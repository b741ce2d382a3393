"""Tensors brought to the host together, against the tensors themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plm_owner_server.engines.ops import to_host as module
from plm_owner_server.engines.ops.to_host import _packed, _unpacked, to_host

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of any dtype and shape, also empty and scalar: dense, strided, transposed or expanded."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layout = draw(st.sampled_from(["dense", "strided", "transposed", "expanded"]))
    size = [*shape[:-1], 3 * shape[-1]] if layout == "strided" and shape else shape
    values = torch.randint(-100, 100, size, generator=generator).to(dtype)
    if layout == "strided" and shape:
        return values[..., ::3]
    if layout == "transposed" and len(shape) > 1:
        return values.transpose(0, -1)
    return values.expand(2, *shape) if layout == "expanded" else values


@given(st.lists(tensors(), min_size=1, max_size=6))
def test_what_is_packed_comes_out_the_same_and_aligned(originals: list[Tensor]) -> None:
    bytes_N = _packed(originals)
    assert bytes_N.dtype == torch.uint8
    assert bytes_N.shape == (sum(tensor.nbytes for tensor in originals),)
    for ours, original in zip(_unpacked(bytes_N, originals), originals, strict=True):
        assert ours.dtype == original.dtype
        assert ours.shape == original.shape
        assert torch.equal(ours, original)
        assert (bytes_N.data_ptr() + ours.storage_offset() * ours.element_size()) % ours.element_size() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_bit_is_changed(dtype: torch.dtype) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40], dtype=dtype)
    (ours,) = _unpacked(_packed([special]), [special])
    assert torch.equal(ours.view(torch.uint8), special.view(torch.uint8))


def test_what_is_on_the_host_comes_back_itself() -> None:
    first, second = torch.ones(2), torch.ones(0)
    here = to_host(first, None, second)
    assert here[0] is first
    assert here[1] is None
    assert here[2] is second
    assert to_host(None) == (None,)
    assert to_host() == ()


def test_what_is_on_the_device_takes_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Tensor] = []
    inner = Tensor.cpu

    def counted(tensor: Tensor, *args: Any) -> Tensor:
        copied.append(tensor)
        return inner(tensor, *args)

    here = torch.ones(3)
    monkeypatch.setattr(module, "_is_remote", lambda tensor: tensor is not here)  # there is no device to be on
    monkeypatch.setattr(Tensor, "cpu", counted)
    cr_N_D, chosen_N = torch.randn(3, 5, dtype=torch.bfloat16), torch.tensor([7, 8, 9])
    answer = to_host(cr_N_D, None, chosen_N, here, torch.tensor(True))
    assert len(copied) == 1
    assert torch.equal(answer[0], cr_N_D)
    assert answer[1] is None
    assert answer[2].tolist() == [7, 8, 9]
    assert answer[3] is here
    assert answer[4].item() is True
