"""Secret bases: orthogonal, uniformly drawn, the same everywhere for the same secret, and for no other."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from harness.tiny_models import TinyModels
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.rotation import Rotation, RotationKey
from tests import support

SECRET = b"a master secret of at least 32 bytes"


def test_a_rotation_changes_no_product() -> None:
    q_D_D = RotationKey.derive(SECRET, "acme", "weights").matrix(37)
    identity = q_D_D.double() @ q_D_D.double().T
    torch.testing.assert_close(identity, torch.eye(37, dtype=torch.float64), rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    f_N_D, w_V_D = (torch.randn(n, 37, generator=generator) for n in (5, 11))
    rotation = Rotation(q_D_D)
    logits = rotation.apply(f_N_D) @ rotation.apply(w_V_D).T
    torch.testing.assert_close(logits, f_N_D @ w_V_D.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotation.apply(f_N_D)[0], q_D_D @ f_N_D[0])
    assert (rotation.apply(f_N_D) - f_N_D).norm() > f_N_D.norm() / 2


@pytest.mark.parametrize("size", [32, 640])
def test_a_row_is_rotated_alike_to_the_last_bit_whatever_is_beside_it(size: int) -> None:
    rotation = Rotation(RotationKey.derive(SECRET, "acme", "weights").matrix(size))
    rows_N_D = torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    all_N_D = rotation.apply(rows_N_D)
    for first in (0, 3):
        for count in (*range(1, 40), 100, 190):
            part = slice(first, first + count)
            assert torch.equal(rotation.apply(rows_N_D[part]), all_N_D[part]), (first, count)
    assert rotation.apply(rows_N_D[:0]).shape == (0, size)


def test_whose_rotation_it_is_and_of_which_model_decide_it_and_nothing_else() -> None:
    keys = [
        RotationKey.derive(secret, tenant, weights)
        for secret in (SECRET, SECRET + b"!")
        for tenant in ("acme", "beta")
        for weights in ("a", "b")
    ]
    assert len({key.fingerprint for key in keys}) == len({key.matrix(4).numpy().tobytes() for key in keys}) == 8
    again = RotationKey.derive(SECRET, "acme", "a")
    assert torch.equal(again.matrix(9), keys[0].matrix(9))
    for shown in (repr(again), again.fingerprint):
        assert again.key.hex() not in shown
        assert str(again.key) not in shown


@pytest.mark.parametrize("size", [2, 3, 8])
def test_all_rotations_are_equally_likely(size: int) -> None:
    """Any fixed row of a Haar-distributed matrix is uniform on the sphere, and the mean of (tr Q)² is 1."""
    draws = 4000
    q_S_D_D = torch.stack([RotationKey(f"{n}".encode()).matrix(size) for n in range(draws)]).double()
    error = 5 / math.sqrt(draws)
    for row in (0, size - 1):
        row_S_D = q_S_D_D[:, row]
        torch.testing.assert_close(row_S_D.mean(0), torch.zeros(size, dtype=torch.float64), rtol=0, atol=error)
        covariance = row_S_D.T @ row_S_D / draws
        torch.testing.assert_close(covariance, torch.eye(size, dtype=torch.float64) / size, rtol=0, atol=error)
        # E[x⁴] on the sphere.
        fourth = 3 / (size * (size + 2))
        assert (row_S_D**4).mean(0).tolist() == pytest.approx([fourth] * size, abs=error)
    traces = q_S_D_D.diagonal(dim1=1, dim2=2).sum(1)
    assert (traces**2).mean().item() == pytest.approx(1.0, abs=3 * error)
    # Reflections, too: half of them.
    assert (torch.linalg.det(q_S_D_D) > 0).double().mean().item() == pytest.approx(0.5, abs=error)


def test_first_calls_that_come_at_once_make_one_rotation(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keep nobody waiting whose view is made already."""
    made, go_on = list[int](), threading.Event()
    inner = RotationKey.matrix

    def matrix(key: RotationKey, size: int) -> torch.Tensor:
        made.append(size)
        assert len(made) == 1 or go_on.wait(60)
        return inner(key, size)

    monkeypatch.setattr(RotationKey, "matrix", matrix)
    models = support.make_service(tiny_models["llama"])._disclosed_models
    rotated = Disclosure("candidate", rotated=True)
    acme = models.for_tenant("acme", rotated)
    with ThreadPoolExecutor(4) as pool:
        first_calls = [pool.submit(models.for_tenant, "beta", rotated) for _ in range(4)]
        assert models.for_tenant("acme", rotated) is acme
        go_on.set()
        one, *others = [call.result(60) for call in first_calls]
    assert all(view is one for view in others)
    assert len(made) == 2
