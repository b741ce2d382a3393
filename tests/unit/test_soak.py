"""The soak's judge accepts the service's answers, and rejects answers that differ a little."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.soak import calls
from benchmarks.soak.tenants import Account, Price, Tenant, add_tenants
from benchmarks.soak.truth import Truth, WrongAnswer
from harness.tiny_models import TinyModels
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.tenants.store import TenantStore
from protocol.codec import Message
from protocol.messages import DecodeRequest, DistributionRequest, EncodeRequest, HeadRequest
from tests.support import make_service


@pytest.fixture(scope="module")
def truth(tiny_models: TinyModels) -> Truth:
    return Truth(tiny_models["gemma3"], size=8)


@pytest.fixture(scope="module")
def service(tiny_models: TinyModels) -> PlmService:
    return make_service(tiny_models["gemma3"])


@pytest.fixture(scope="module")
def tenants(truth: Truth, service: PlmService, tmp_path_factory: pytest.TempPathFactory) -> list[Tenant]:
    """One of each disclosure."""
    store = TenantStore(f"sqlite:///{tmp_path_factory.mktemp('owner')}/owner.db")
    good, _ = add_tenants(store, len(truth.head_V_D), 0)
    for tenant in good[:5]:
        rows, ids = None, tenant.candidates[:10]
        if tenant.disclosure.head_policy != "none":
            rows = service.lm_head(HeadRequest(token_ids=ids, dtype="float32"), _caller(tenant))
        tenant.sight = calls.sight_of(service.model_card(_caller(tenant)).digest, tenant, rows, ids)
    return good[:5]


def _caller(tenant: Tenant) -> CallContext:
    return CallContext(tenant.name, tenant.name, tenant.disclosure)


def _answer(service: PlmService, tenant: Tenant, call: calls.Call) -> Message:
    caller, request = _caller(tenant), call.request
    if isinstance(request, EncodeRequest):
        return service.encode(request, caller)
    if isinstance(request, DecodeRequest):
        return service.decode(request, caller)
    if isinstance(request, HeadRequest):
        return service.lm_head(request, caller)
    if isinstance(request, DistributionRequest):
        return service.distribution(request, caller)
    return service.model_card(caller)


def _spoilt(answer: Message, chance: random.Random) -> Message:
    """One number of an answer a little different, or its digest."""
    fields = {name: getattr(answer, name) for name in type(answer).model_fields}
    tensors = [name for name, value in fields.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if not tensors:
        return answer.model_copy(update={"digest": "0" * 64})
    name = chance.choice(tensors)
    values = fields[name].clone()
    flat = values.view(-1)
    flat[flat.abs().argmax()] *= 1.05
    return answer.model_copy(update={name: values})


def test_right_answers_pass_and_wrong_ones_do_not(truth: Truth, service: PlmService, tenants: list[Tenant]) -> None:
    chance, kinds = random.Random(0), set()
    for tenant in tenants:
        for _ in range(30):
            call = calls.draw(truth, tenant)
            answer = _answer(service, tenant, call)
            call.check(answer)
            with pytest.raises(WrongAnswer):
                call.check(_spoilt(answer, chance))
            kinds.add(call.kind)
    assert kinds == {"card", "head", "encode", "decode", "distribution"}


def test_answers_of_another_tenant_are_wrong(truth: Truth, service: PlmService, tenants: list[Tenant]) -> None:
    ours, *others = tenants
    call = calls.draw(truth, ours)
    call.check(_answer(service, ours, call))
    for other in others:
        with pytest.raises(WrongAnswer):
            call.check(_answer(service, other, call))


def test_an_account_is_exact_but_for_what_nobody_knows() -> None:
    account = Account()
    account.add(Price(tokens=7, rows=frozenset({1, 2})))
    account.add(Price(tokens=3, rows=frozenset({2, 3}), distribution=0))
    right = {"requests": 2, "tokens": 10, "head_rows": 3, "full_distributions": 1}
    half = {name: value - value // 2 for name, value in right.items()}
    rest = {name: value // 2 for name, value in right.items()}
    assert not list(account.faults([right]))
    assert not list(account.faults([half, rest]))  # on two days
    for name in right:
        for more in (-1, 1):
            assert len(list(account.faults([right | {name: right[name] + more}]))) == 1
    account.unanswered.append(Price(tokens=5))
    assert not list(account.faults([right | {"requests": 3, "tokens": 15}]))
    assert list(account.faults([right | {"requests": 4}])) == ["requests 4, not 2 to 3"]


def test_a_schedule_is_its_seeds(truth: Truth, tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> list[object]:
        good, _ = add_tenants(TenantStore(f"sqlite:///{tmp_path}/{name}.db"), len(truth.head_V_D), seed)
        good[0].sight = calls.sight_of("0" * 64, good[0], None, [])
        return [calls.draw(truth, good[0]).request for _ in range(20)]

    assert drawn("one", 0) == drawn("two", 0) != drawn("three", 1)
