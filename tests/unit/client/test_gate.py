import math

import torch
from torch import Tensor

from data_owner_client.adapter.gate import Gate, cross_validated_nll, gate_features
from data_owner_client.adapter.interpolation import mix

N, C = 600, 9


def sides(seed: int, *, telling: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of which each side knows half; `telling`: the one that knows is sure, and the other is not."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(C, (N,), generator=generator)
    knows_N = torch.rand(N, generator=generator) < 0.5
    columns = []
    for right_N in (knows_N, ~knows_N):
        logits_N_C = 0.5 * torch.randn(N, C, generator=generator)
        sure_N = right_N if telling else torch.rand(N, generator=generator) < 0.5
        favourite_N = torch.where(right_N, label_N, torch.randint(C, (N,), generator=generator))
        logits_N_C[torch.arange(N), favourite_N] += torch.where(sure_N, 5.0, 1.0)
        columns.append(logits_N_C.log_softmax(-1).double())
    position_N = torch.arange(N) % 6
    plm_N_C, pema_N_C = columns
    plm_N, pema_N = (logprob_N_C.gather(1, label_N[:, None])[:, 0] for logprob_N_C in columns)
    return gate_features(plm_N_C, pema_N_C, position_N), plm_N, pema_N, position_N


def nll(plm_N: Tensor, pema_N: Tensor, lambda_N: Tensor) -> float:
    return -mix(plm_N, pema_N, lambda_N).mean().item()


def best_constant(plm_N: Tensor, pema_N: Tensor) -> float:
    return min(nll(plm_N, pema_N, torch.full((N,), i / 50).double()) for i in range(1, 50))


def test_a_gate_learns_which_side_knows() -> None:
    features_N_F, plm_N, pema_N, position_N = sides(1, telling=True)
    gate = Gate.fit(features_N_F, plm_N, pema_N)
    others_N_F, plm_others_N, pema_others_N, _ = sides(2, telling=True)
    lambda_N = gate.lambdas(others_N_F)
    assert ((lambda_N > 0) & (lambda_N < 1)).all()
    assert lambda_N[pema_others_N > plm_others_N].mean() > lambda_N[pema_others_N < plm_others_N].mean() + 0.3
    assert nll(plm_others_N, pema_others_N, lambda_N) < best_constant(plm_others_N, pema_others_N) - 0.1
    unseen, mean = cross_validated_nll(features_N_F, plm_N, pema_N, position_N)
    assert unseen < best_constant(plm_N, pema_N) - 0.1
    assert 0.3 < mean < 0.7


def test_where_nothing_tells_a_gate_is_not_thought_better_than_it_is() -> None:
    features_N_F, plm_N, pema_N, position_N = sides(3, telling=False)
    fitted = nll(plm_N, pema_N, Gate.fit(features_N_F, plm_N, pema_N).lambdas(features_N_F))
    unseen, _ = cross_validated_nll(features_N_F, plm_N, pema_N, position_N)
    assert unseen > fitted
    assert unseen > best_constant(plm_N, pema_N) - 0.05


def test_targets_that_are_no_candidates_are_left_to_the_plm() -> None:
    features_N_F, plm_N, pema_N, position_N = sides(4, telling=True)
    pema_N = torch.where(torch.arange(N) % 3 == 0, -math.inf, pema_N)
    gate = Gate.fit(features_N_F, plm_N, pema_N)
    assert all(map(math.isfinite, gate.weight))
    assert math.isfinite(cross_validated_nll(features_N_F, plm_N, pema_N, position_N)[0])


def test_one_example_is_enough_for_a_gate_that_can_be_used() -> None:
    features_N_F, plm_N, pema_N, _ = sides(5, telling=True)
    gate = Gate.fit(features_N_F[:1], plm_N[:1], pema_N[:1])
    assert gate.lambdas(features_N_F).isfinite().all()
    assert math.isfinite(cross_validated_nll(features_N_F[:3], plm_N[:3], pema_N[:3], torch.arange(3))[0])
    assert Gate.model_validate_json(gate.model_dump_json()) == gate
