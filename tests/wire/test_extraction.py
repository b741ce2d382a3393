"""Attacks of a malicious client under each budget: the claims of docs/threat-model.md, tried."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from harness.tiny_models import TinyModels
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from tests.support import make_service, random_ids

D = 32
THIEF = CallContext("thief", "thief", Disclosure("none", rotated=True))


@pytest.fixture(scope="module")
def service(tiny_models: TinyModels) -> PlmService:
    return make_service(tiny_models["llama"])


@pytest.fixture(scope="module")
def head_V_D(service: PlmService) -> Tensor:
    """The LM head in the thief's basis, as an accomplice with the policy `full` would be given it."""
    accomplice = CallContext("thief", "thief", Disclosure("full", rotated=True))
    return service.lm_head(HeadRequest(dtype="float32"), accomplice).weight_N_D.double()


def _stolen(service: PlmService, contexts: list[list[int]]) -> Tensor:
    """W by least squares, [V, D], from a full distribution and a representation of each context."""
    request = EncodeRequest(
        token_ids=contexts, from_position=[len(c) - 1 for c in contexts], dtype="float32", with_logsumexp=True
    )
    seen = service.encode(request, THIEF)
    assert seen.logsumexp_N is not None
    logprob_N_V = torch.stack(
        [service.distribution(DistributionRequest(token_ids=c, top_k=0), THIEF).logprob_K for c in contexts]
    )
    logits_N_V = (logprob_N_V + seen.logsumexp_N[:, None]).double()
    weight_D_V: Tensor = torch.linalg.lstsq(seen.cr_N_D.double(), logits_N_V, driver="gelsd").solution
    return weight_D_V.T


def test_as_many_distributions_as_the_head_is_wide_give_it_and_fewer_do_not(
    service: PlmService, head_V_D: Tensor
) -> None:
    contexts = random_ids(7, [6] * D)
    errors = [
        ((_stolen(service, contexts[:budget]) - head_V_D).norm() / head_V_D.norm()).item()
        for budget in (D // 2, D - 1, D)
    ]
    # Without budget for so many directions, so much of W is missing: of squares about the share that is unknown.
    assert errors[0] == pytest.approx(0.5**0.5, abs=0.15)
    assert errors[1] > 0.05
    assert errors[2] < 0.005


def test_tokens_that_the_model_often_prefers_are_given_away_by_its_top1(service: PlmService, head_V_D: Tensor) -> None:
    contexts = random_ids(11, [3] * 512)
    request = DecodeRequest(token_ids=contexts, look_ahead=[3] * len(contexts), dtype="float32")
    seen = service.decode(request, THIEF)
    (token, times), *_ = Counter(seen.top1_N.tolist()).most_common(1)
    assert times >= D
    mine_N = seen.top1_N == token
    logit_N = (seen.top1_logprob_N + seen.logsumexp_N)[mine_N].double()
    row_D = torch.linalg.lstsq(seen.cr_N_D[mine_N].double(), logit_N[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(row_D, head_V_D[token], rtol=0, atol=0.01 * head_V_D[token].norm().item())


def test_tokens_that_are_often_likely_are_given_away_by_parts_of_distributions(
    service: PlmService, head_V_D: Tensor
) -> None:
    """Rows cost no budget here: a token that is never the most probable is often among a hundred."""
    contexts = random_ids(13, [4] * (3 * D))
    request = EncodeRequest(token_ids=contexts, from_position=[3] * len(contexts), dtype="float32", with_logsumexp=True)
    seen = service.encode(request, THIEF)
    assert seen.logsumexp_N is not None
    parts = [service.distribution(DistributionRequest(token_ids=c, top_k=100), THIEF) for c in contexts]
    ids_N_K = torch.stack([part.token_ids_K for part in parts])
    logit_N_K = torch.stack([part.logprob_K for part in parts]) + seen.logsumexp_N[:, None]
    times_V = ids_N_K.flatten().bincount(minlength=len(head_V_D))
    times_V[ids_N_K[:, 0]] = 0
    token = int(times_V.argmax())
    assert D <= times_V[token] < len(contexts)
    mine_N_K = ids_N_K == token
    mine_N = mine_N_K.any(dim=1)
    logit_N = logit_N_K[mine_N_K].double()
    row_D = torch.linalg.lstsq(seen.cr_N_D[mine_N].double(), logit_N[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(row_D, head_V_D[token], rtol=0, atol=0.01 * head_V_D[token].norm().item())


def test_rotation_hides_nothing_from_those_who_know_the_model(service: PlmService, head_V_D: Tensor) -> None:
    true_V_D = service.lm_head(HeadRequest(dtype="float32")).weight_N_D.double()
    assert (head_V_D - true_V_D).norm() > true_V_D.norm() / 2
    left, _, right = torch.linalg.svd(head_V_D[:D].T @ true_V_D[:D])  # orthogonal Procrustes
    unseen = slice(D, None)
    torch.testing.assert_close(true_V_D[unseen] @ (left @ right).T, head_V_D[unseen], rtol=0, atol=1e-4)
    # And what it never hides.
    torch.testing.assert_close(head_V_D @ head_V_D.T, true_V_D @ true_V_D.T, rtol=1e-4, atol=1e-4)
