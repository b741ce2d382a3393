"""Rows of the LM head by least squares, against textbook solutions; and which contexts are asked for."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_owner_client import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.memory.build import build_memory
from data_owner_client.memory.tokenized_pairs import tokenize_pair
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.head_recovery.least_squares import NormalEquations, Solutions
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.training.head_contexts import Context, sample_contexts
from plm_owner_server.service.plm_service import PlmService
from protocol.head import LMHead

D, C = 24, 7
TASK = Task(name="t", source_label="In", target_label="Out")
PAIRS = [Pair("the thin", "die"), Pair("an", "on the"), Pair("an", "on the"), Pair("her", "there")]


def make(contexts: int, *, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [N, D] that differ less and less along their axes, rows [C, D], a bias [C], products [N, C]."""
    generator = torch.Generator().manual_seed(contexts)
    falling_D = torch.arange(1, D + 1, dtype=torch.float64) ** -1.0
    input_N_D = torch.randn(contexts, D, generator=generator, dtype=torch.float64) * falling_D
    weight_C_D = torch.randn(C, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias_C = torch.arange(C, dtype=torch.float64)
    noise_N_C = noise * torch.randn(contexts, C, generator=generator, dtype=torch.float64)
    return input_N_D, weight_C_D, bias_C, input_N_D @ weight_C_D.T + noise_N_C


def solved(input_N_D: Tensor, product_N_C: Tensor, *, bias: bool = False) -> Solutions:
    equations = NormalEquations(D, C, bias=bias)
    for inputs, products in zip(input_N_D.split(10), product_N_C.split(10), strict=True):
        equations.add(inputs, products)
    return equations.solve()


@pytest.mark.parametrize("bias", [False, True])
def test_enough_contexts_give_the_rows(bias: bool) -> None:
    input_N_D, weight_C_D, bias_C, product_N_C = make(D + 12)
    solutions = solved(input_N_D, product_N_C + bias_C * bias, bias=bias)
    weakest = next(solutions.ridges())
    weight, found_bias = solutions.rows(weakest)
    torch.testing.assert_close(weight, weight_C_D.float(), rtol=0, atol=1e-5)
    assert (found_bias is not None) == bias
    assert found_bias is None or torch.allclose(found_bias, bias_C.float(), atol=1e-5)
    expected = input_N_D @ weight_C_D.T + bias_C * bias
    torch.testing.assert_close(solutions.products(input_N_D, weakest), expected, rtol=0, atol=1e-6)


def test_fewer_contexts_give_the_shortest_rows_that_fit() -> None:
    input_N_D, _, _, product_N_C = make(D // 2)
    solutions = solved(input_N_D, product_N_C)
    # Weak, but stronger than what rounding leaves in the directions in which no context lies.
    weight, _ = solutions.rows(list(solutions.ridges())[3])
    shortest = torch.linalg.pinv(input_N_D) @ product_N_C
    torch.testing.assert_close(weight.T, shortest.float(), rtol=0, atol=1e-4)


def test_a_ridge_is_better_where_there_is_noise() -> None:
    input_N_D, weight_C_D, _, product_N_C = make(D + 2, noise=0.3)
    solutions, (other_N_D, *_) = solved(input_N_D, product_N_C), make(200)
    off = [(solutions.products(other_N_D, ridge) - other_N_D @ weight_C_D.T).norm() for ridge in solutions.ridges()]
    assert min(off) < off[0] / 2


def test_products_are_what_logits_came_from() -> None:
    head = LMHead(torch.empty(0), logit_scale=0.5, softcap=3.0)
    product_N_V = torch.linspace(-20, 20, 50, dtype=torch.float64)[None]
    torch.testing.assert_close(head.products_from_logits(head.logits_from_products(product_N_V)), product_N_V)
    assert head.products_from_logits(torch.tensor([[3.0, -3.0]])).isfinite().all()


@pytest.mark.parametrize("shared", [False, True], ids=["private", "teacher-forced"])
def test_contexts_are_those_of_the_memory(shared: bool, tiny_service: PlmService, tmp_path: Path) -> None:
    plm = RemotePlm(InProcessConnection(tiny_service), cache=None)
    mode: ContextMode = "teacher-forced" if shared else "private"
    memory = build_memory(plm, TASK, PAIRS, tmp_path, context_mode=mode, share_targets=shared)
    shown = set[Context]()
    for pair in PAIRS:
        ids = tokenize_pair(plm, TASK, pair)
        for position in range(len(ids.target)):
            prefix, drafted = (ids.prompt + ids.target[:position], 0) if shared else (ids.prompt, position)
            shown.add(Context(tuple(prefix), drafted))
    found = list(sample_contexts(plm, memory.manifest.plan, PAIRS))
    assert len(found) == len({context.key for context in found}) == len(shown)
    assert set(found) == shown
    # So that more of them are the same ones and others.
    assert list(islice(sample_contexts(plm, memory.manifest.plan, PAIRS), 5)) == found[:5]
