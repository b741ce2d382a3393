"""Packed linear layers against the product in float64."""

import pytest
import torch
from torch import Tensor, nn

from plm_owner_server.engines.ops.packed_linear import PackedLinear, can_pack, pack_linear_layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (7, 3), (48, 32), (300, 640)])
@pytest.mark.parametrize("shape", [(), (1,), (33,), (2, 5), (2, 521)])
@torch.inference_mode()
def test_product(out_features: int, in_features: int, shape: tuple[int, ...], *, bias: bool) -> None:
    generator = torch.Generator().manual_seed(out_features)
    linear = nn.Linear(in_features, out_features, bias=bias)
    packed = PackedLinear(linear.weight, linear.bias)
    x = torch.randn((*shape, in_features), generator=generator)
    expected = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.weight, linear.weight)


def test_only_plain_linear_layers_in_float32_change() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Sequential(nn.Linear(4, 2)), nn.Linear(2, 2).bfloat16())
    model.requires_grad_(requires_grad=False)
    x = torch.randn(3, 4)
    before = model[:3](x)
    pack_linear_layers(model)
    assert [type(layer) for layer in model] == [PackedLinear, Own, nn.Sequential, nn.Linear]
    inner = model[2]
    assert isinstance(inner, nn.Sequential)
    assert isinstance(inner[0], PackedLinear)
    torch.testing.assert_close(model[:3](x), before)
    assert isinstance(model[3], nn.Linear)
    assert not can_pack(model[3].weight)
