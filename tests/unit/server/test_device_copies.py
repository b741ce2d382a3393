"""Copies from the device to the host: as few as can be, on a device that is simulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch, Encoded
from plm_owner_server.engines.ops import to_host
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.engines.transformers.model_runner import ModelRunner
from protocol.types import CrKind
from tests.support import random_ids
from tests.transformers_engine import drafted


class Copied(Tensor):
    """The copied tensor on the host, once it may be read."""


class OnADevice(TorchFunctionMode):
    """Takes every tensor for one on a device: the engine may read what it has copied, and nothing else.

    What the model itself does is not watched.
    """

    waits = (
        *(Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
        *(Tensor.__index__, Tensor.nonzero, torch.nonzero, Tensor.unique, Tensor.masked_select, torch.equal),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.copies = 0
        self._in_model = False
        forward = ModelRunner.forward

        def unwatched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self._in_model = True
            try:
                return forward(*args, **kwargs)
            finally:
                self._in_model = False

        monkeypatch.setattr(to_host, "_is_remote", lambda tensor: True)
        monkeypatch.setattr(ModelRunner, "forward", unwatched)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._in_model:
            return result
        if func is Tensor.cpu:
            self.copies += 1
            return result.as_subclass(Copied)
        waits = func in self.waits or (func is Tensor.__getitem__ and _selects_by_a_mask(args[1]))
        assert not waits or isinstance(args[0], Copied), func
        return result


def _selects_by_a_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def assert_same(ours: Encoded, theirs: Encoded) -> None:
    assert vars(ours).keys() == vars(theirs).keys()
    for name, value in vars(theirs).items():
        other = getattr(ours, name)
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name


@pytest.mark.parametrize("cr_kind", ["last_hidden_state", "ffn_output"])
def test_a_batch_takes_one_copy_from_the_device_and_a_step_one_more(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, cr_kind: CrKind
) -> None:
    def engine() -> TransformersEngine:
        return TransformersEngine(model, cr_kind=cr_kind)

    encoding = random_ids(21, [90, 82, 85], shared=80), [79, 81, 84]  # with a pass for what they share
    drafting: list[Any] = [
        (random_ids(22, [12] * 4), [9, 2, 5, 0], frozenset()),
        (random_ids(23, [2, 4, 3]), [3, 0, 1], frozenset()),  # padded, and so within the window
        (random_ids(24, [5, 5]), [0, 0], frozenset()),
    ]
    encoded = engine().encode(EncodeBatch(*encoding, with_logsumexp=True))
    decoded = [drafted(engine(), *batch) for batch in drafting]
    stop = decoded[0].top1_N[:1].tolist()  # the first of them never goes on
    drafting.append((drafting[0][0][:1], [9], frozenset(stop)))
    decoded.append(drafted(engine(), *drafting[-1]))

    watch = OnADevice(monkeypatch)
    with watch:
        encoded_there = engine().encode(EncodeBatch(*encoding, with_logsumexp=True))
        assert watch.copies == 1
        decoded_there = []
        for batch in drafting:
            ours, watch.copies = engine(), 0
            starts = [len(ids) - 1 for ids in batch[0]]
            draft, done = ours.drafting(4096), list[tuple[DraftBatch, Decoded]]()
            draft.join([DraftBatch(batch[0], starts, *batch[1:])])
            assert watch.copies == 0
            while not done:
                before, done = watch.copies, draft.step()
                assert watch.copies - before <= 1 + len(done)
            # The token after the last one is needed only where it may be a stop token.
            assert watch.copies == max(batch[1]) + 1 if not batch[2] else 2
            decoded_there.append(done[0][1])
    assert_same(encoded_there, encoded)
    for there, here in zip(decoded_there, decoded, strict=True):
        assert_same(there, here)
