import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import NumericalFault
from protocol.messages import DTYPES
from protocol.quantization import dequantize, quantize
from protocol.types import WireDtype


@given(
    rows=st.integers(1, 5), width=st.integers(1, 40), scale=st.sampled_from([1e-30, 1.0, 3e4, 1e30]), seed=st.integers()
)
def test_int8_is_off_by_at_most_half_a_step_of_its_row(rows: int, width: int, scale: float, seed: int) -> None:
    values_N_D = scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed % 2**31))
    int8_N_D, scale_N = quantize(values_N_D, "int8", "rows")
    assert int8_N_D.dtype == torch.int8
    assert scale_N is not None
    step_N = values_N_D.double().abs().amax(dim=1) / 127
    error_N_D = (dequantize(int8_N_D, scale_N).double() - values_N_D.double()).abs()
    assert (error_N_D <= 0.5001 * step_N[:, None]).all()
    assert (int8_N_D.int().abs().amax(dim=1) == 127).all()


def test_rows_of_zeros_and_no_rows_pass() -> None:
    zeros_N_D, scale_N = quantize(torch.zeros(2, 3), "int8", "rows")
    assert torch.equal(dequantize(zeros_N_D, scale_N), torch.zeros(2, 3))
    assert quantize(torch.zeros(0, 3), "int8", "rows")[0].shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floats_are_a_cast(dtype: WireDtype) -> None:
    values_N_D = torch.randn(4, 7)
    converted_N_D, scale_N = quantize(values_N_D, dtype, "rows")
    assert torch.equal(dequantize(converted_N_D, scale_N), values_N_D.to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_not_finite_is_refused(dtype: WireDtype) -> None:
    with pytest.raises(NumericalFault, match="1 of 2 values of these rows"):
        quantize(torch.tensor([[1.0, float("inf")]]), dtype, "these rows")
