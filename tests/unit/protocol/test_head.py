"""The LM head as a function."""

from __future__ import annotations

import math

import torch

from protocol.head import LMHead

FULL = LMHead(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]), torch.tensor([0.5, 0.0, -1.0]), 2.0, 5.0)
H = torch.tensor([[1.0, -1.0]])


def test_logits_by_hand() -> None:
    # h Wᵀ + b = [-0.5, 1, 1.5]; times the scale = [-1, 2, 3]; then the soft-cap
    expected = [5 * math.tanh(x / 5) for x in (-1.0, 2.0, 3.0)]
    torch.testing.assert_close(FULL.logits(H), torch.tensor([expected]))
    plain = LMHead(FULL.weight_V_D)
    assert plain.logits(H).tolist() == [[-1.0, 1.0, 2.5]]


def test_rows_are_the_same_function_of_fewer_tokens() -> None:
    chosen = torch.tensor([2, 0, 2])
    torch.testing.assert_close(FULL.rows(chosen).logits(H), FULL.logits(H)[:, chosen])
    torch.testing.assert_close(FULL.rows(slice(1, 3)).logits(H), FULL.logits(H)[:, 1:3])


def test_another_dtype_keeps_bias_scale_and_softcap() -> None:
    double = FULL.to(torch.float64)
    assert double.logits(H).dtype == torch.float64
    torch.testing.assert_close(double.logits(H).float(), FULL.logits(H))
    half = FULL.to(torch.float16)
    assert half.bias_V is not None
    assert half.bias_V.dtype == half.weight_V_D.dtype == torch.float16
