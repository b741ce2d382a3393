"""Pieces of the tests that compare the engine with transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plm_owner_server.engines.interface import Decoded, DraftBatch
from plm_owner_server.engines.transformers.engine import TransformersEngine
from protocol.messages import DecodeResponse
from tests import drafting
from tests.support import ARCHITECTURES_IN_CI

TOLERANCE = 1e-4
Truth = Callable[[Sequence[int]], tuple[Tensor, Tensor]]
"""Last hidden states and logits of one sequence, from the whole model."""

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES_IN_CI, indirect=True)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def greedy(model: PreTrainedModel, ids: Sequence[int], tokens: int) -> list[int]:
    """The continuation by transformers itself, which stops at the model's own end of text."""
    input_ids = torch.tensor([list(ids)], device=model.device)
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=tokens
    )
    return list(output[0, len(ids) :].tolist())


def drafted(
    engine: TransformersEngine,
    texts: list[list[int]],
    look_ahead: list[int],
    stop_ids: frozenset[int],
    from_position: list[int] | None = None,
) -> Decoded:
    starts = [len(ids) - 1 for ids in texts] if from_position is None else from_position
    return drafting.drafted(engine, [DraftBatch(texts, starts, look_ahead, stop_ids)])[0]


def drafts(answer: DecodeResponse) -> list[list[int]]:
    return [part.tolist() for part in answer.top1_N.split(answer.rows_B.tolist())]
