"""Launches and synchronisations of the engine on a simulated CUDA device, the model's own included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.tiny_models import EOS
from plm_owner_server.engines.interface import Decoded, DraftBatch, EncodeBatch, Encoded
from plm_owner_server.engines.transformers.engine import TransformersEngine
from plm_owner_server.engines.transformers.model_runner import ModelRunner
from protocol.types import CrKind
from tests.simulated_device import DEVICE, DeviceTensor, SimulatedDevice
from tests.support import random_ids
from tests.transformers_engine import drafted, every_architecture

# Launches of a step beside the model's: tokens, positions, mask and indices to the device; rows, log-sum-exp and top-1;
# the chosen tokens to the host.
_OWN_LAUNCHES = 20


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    return SimulatedDevice(monkeypatch)


def on(device: SimulatedDevice, model: PreTrainedModel, **options: Any) -> TransformersEngine:
    """An engine whose model is on the device."""
    there = copy.deepcopy(model)
    device.adopt(there)
    return TransformersEngine(there, **{"cr_kind": "last_hidden_state"} | options)


def assert_same(ours: Encoded, theirs: Encoded) -> None:
    """Require equal results, floats up to the order of their sums, which depends on the CPU's kernels."""
    assert vars(ours).keys() == vars(theirs).keys()
    for name, value in vars(theirs).items():
        other = getattr(ours, name)
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda there: there.sum().item(), 1),
        (lambda there: bool((there > 0).all()), 1),
        (lambda there: there.cpu(), 1),
        (lambda there: there[there > 0], 1),
        (lambda there: there.nonzero(), 1),
        (lambda there: torch.ones(3).to(DEVICE), 1),
        (lambda there: torch.ones(3).to(DEVICE, non_blocking=True), 1),  # not pinned
        (lambda there: torch.tensor([1.0, 2.0], device=DEVICE), 1),
        (lambda there: torch.empty(2, 3).copy_(there, non_blocking=True), 1),  # not pinned
        (lambda there: torch.empty(2, 3, pin_memory=True).copy_(there), 1),
        (lambda there: torch.empty(2, 3, pin_memory=True).copy_(there, non_blocking=True), 0),
        (lambda there: torch.ones(3).pin_memory().to(DEVICE, non_blocking=True), 0),
        (lambda there: there[torch.tensor([1])], 1),  # the index goes to the device
        (lambda there: there.softmax(-1)[:, there.argmax(1)], 0),
        (lambda there: there[1:].zero_().to(DEVICE), 0),
    ],
)
def test_the_device_counts_what_the_host_waits_for(
    device: SimulatedDevice, work: Callable[[Tensor], object], waits: int
) -> None:
    with device:
        work(DeviceTensor(torch.randn(2, 3)))
    assert device.waits.total() == waits


@every_architecture
@pytest.mark.parametrize("shared", [80, 0])  # with a pass for what the texts share; without
def test_encoding_waits_once(model: PreTrainedModel, device: SimulatedDevice, shared: int) -> None:
    batch = EncodeBatch(random_ids(21, [90, 82, 85], shared=shared), [79, 81, 84], with_logsumexp=True)
    expected = TransformersEngine(model, cr_kind="last_hidden_state").encode(batch)
    with device:
        ours = on(device, model)
        device.clear()
        encoded = ours.encode(batch)
    assert device.waits == {"event": 1}
    assert_same(encoded, expected)


@every_architecture
@pytest.mark.parametrize("cr_kind", ["last_hidden_state", "ffn_output"])
@pytest.mark.parametrize(
    ("lengths", "look_ahead", "stops"),
    [
        ([12] * 4, [9, 2, 5, 0], False),
        ([2, 4, 3], [3, 0, 1], False),  # padded, and so within the window
        ([30, 4, 17], [5, 5, 5], False),  # padded beyond it
        ([5, 5], [0, 0], False),
        ([12], [9], True),
    ],
)
def test_a_step_waits_once_and_for_results_once_more(
    architecture: str,
    model: PreTrainedModel,
    device: SimulatedDevice,
    cr_kind: CrKind,
    lengths: list[int],
    look_ahead: list[int],
    *,
    stops: bool,
) -> None:
    if architecture == "opt-projected" and cr_kind == "ffn_output":
        pytest.skip("its head takes no feed-forward output")
    texts, stop_ids = random_ids(22, lengths), frozenset[int]()
    expected = drafted(TransformersEngine(model, cr_kind=cr_kind), texts, look_ahead, stop_ids)
    if stops:  # at the first token, which the host must know of
        stop_ids = frozenset(expected.top1_N[:1].tolist())
        expected = drafted(TransformersEngine(model, cr_kind=cr_kind), texts, look_ahead, stop_ids)
    with device:
        drafting, done = on(device, model, cr_kind=cr_kind).drafting(4096), list[tuple[DraftBatch, Decoded]]()
        device.clear()
        drafting.join([DraftBatch(texts, [len(ids) - 1 for ids in texts], look_ahead, stop_ids)])
        assert not device.waits
        while not done:
            device.clear()
            done = drafting.step()
            assert device.waits.keys() <= {"event"}
            assert device.waits.total() <= 1 + len(done)
    assert_same(done[0][1], expected)


@every_architecture
def test_batches_that_join_and_end_together_are_waited_for_once(
    model: PreTrainedModel, device: SimulatedDevice
) -> None:
    batches = [
        DraftBatch(random_ids(seed, [length]), [length - 1], [3], frozenset([EOS]), str(seed))
        for seed, length in ((1, 40), (2, 4), (3, 21))
    ]
    with device:
        drafting, done = on(device, model).drafting(4096), list[DraftBatch]()
        device.clear()
        drafting.join(batches)
        assert not device.waits
        while len(done) < len(batches):
            device.clear()
            ended = [batch for batch, _ in drafting.step()]
            done += ended
            assert device.waits.total() <= 1 + bool(ended)


def test_a_step_launches_little_beside_the_model_whatever_the_batch(
    model: PreTrainedModel, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_model, inner = list[int](), ModelRunner.forward

    def counted(self: ModelRunner, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = device.launches.total()
        result = inner(self, *args, **kwargs)
        of_model.append(device.launches.total() - before)
        return result

    monkeypatch.setattr(ModelRunner, "forward", counted)
    launches = []
    for lengths in ([9], [9] * 8, [9, 7, 8, 5]):
        with device:
            drafting = on(device, model).drafting(4096)
            drafting.join([DraftBatch(random_ids(3, lengths), [n - 1 for n in lengths], [6] * len(lengths))])
            drafting.step()
            device.clear()
            drafting.step()
        launches.append(device.launches.total() - of_model[-1])
    assert max(launches) <= _OWN_LAUNCHES
    assert launches[0] == launches[1]
    assert launches[2] <= launches[0] + 1  # the mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_to_the_host_in_the_models_dtype(
    model: PreTrainedModel, device: SimulatedDevice, dtype: torch.dtype
) -> None:
    texts = random_ids(24, [30, 20])
    with device:
        ours = on(device, copy.deepcopy(model).to(dtype))
        device.clear()
        encoded = ours.encode(EncodeBatch(texts, [0, 0]))
    assert encoded.cr_N_D.dtype == dtype
    ids_as_run = 2 * 30 * 8
    assert device.bytes_to_host == 50 * ours.info.hidden_size * dtype.itemsize + ids_as_run
