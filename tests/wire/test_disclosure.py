"""Tenants with other policies and bases see the same distributions of one model, over both transports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_owner_client import Pair, TrainingSettings, build_memories, train
from data_owner_client.data.tasks import Task
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import VOCAB_SIZE, TinyModels
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.service.disclosure import FULL_DISCLOSURE, Disclosure
from plm_owner_server.tenants.store import TenantStore
from protocol.errors import Forbidden, IdentityMismatch, Unsupported
from protocol.messages import HeadRequest
from tests import guard
from tests.support import make_service, serve, serve_over_grpc

DISCLOSURES = {
    "ourselves": FULL_DISCLOSURE,
    "acme": Disclosure("candidate", rotated=True),
    "beta": Disclosure("candidate", rotated=True),
    "plain": Disclosure("candidate"),
    "whole": Disclosure("full", rotated=True),
    "nothing": Disclosure("none", rotated=True),
}
TEXTS = [[5, 6, 7, 8], [9, 10]]
FFN = pytest.mark.transformers_only(reason="only it gives feed-forward outputs")
Plms = dict[str, RemotePlm]


# A head with a bias, with a scale, with a soft-cap; a representation that is not the head's input.
@pytest.fixture(
    scope="module",
    params=[
        ("phi", "last_hidden_state"),
        ("cohere", "last_hidden_state"),
        pytest.param(("gemma2", "ffn_output"), marks=FFN),
    ],
    ids=["phi", "cohere", "gemma2-ffn"],
)
def plms(
    request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Plms]:
    """A tenant of each kind, every other one over gRPC."""
    architecture, cr_kind = request.param
    folder = tmp_path_factory.mktemp("owner")
    store = TenantStore(f"sqlite:///{folder}/owner.db")
    service = make_service(tiny_models[architecture], cr_kind=cr_kind)
    servers: list[Callable[..., AbstractContextManager[str]]] = [serve, serve_over_grpc]
    with ExitStack() as stack:
        urls = [stack.enter_context(server(service, access=TenantKeyAuthenticator(store))) for server in servers]
        plms = {}
        for number, (name, disclosure) in enumerate(DISCLOSURES.items()):
            key = str(store.add(name, disclosure=disclosure))
            connection = guard.connection(urls[number % 2], api_key=key)
            plms[name] = stack.enter_context(RemotePlm(connection, dtype="float32", cache=folder / "cache"))
        yield plms


def test_cards_tell_what_is_disclosed_and_differ(plms: Plms) -> None:
    for name, plm in plms.items():
        assert Disclosure(plm.card.head_policy, plm.card.rotated) == DISCLOSURES[name]
    assert len({plm.card.digest for plm in plms.values()}) == len(plms)
    rotated = {plm.card.head_digest for plm in plms.values() if plm.card.rotated}
    assert len(rotated) == 4
    assert plms["plain"].card.head_digest == plms["ourselves"].card.head_digest
    assert len({plm.card.tokenizer_digest for plm in plms.values()}) == 1


def _logits(plm: RemotePlm, rows_N_D: Tensor, ids_C: Tensor) -> Tensor:
    return plm.head_rows(ids_C).logits(rows_N_D)


def test_logits_are_the_same_in_every_basis(plms: Plms) -> None:
    ids_C = torch.tensor([0, 3, 7, VOCAB_SIZE - 1])
    truth = plms["ourselves"].encode(TEXTS, [0, 1], with_logsumexp=True)
    decoded = plms["ourselves"].decode(TEXTS, [3, 2])
    for name in ("acme", "beta", "plain", "whole", "nothing"):
        ours, drafts = plms[name].encode(TEXTS, [0, 1], with_logsumexp=True), plms[name].decode(TEXTS, [3, 2])
        assert torch.equal(drafts.top1_N, decoded.top1_N)
        pairs = [(ours.cr_N_D, truth.cr_N_D), (drafts.cr_N_D, decoded.cr_N_D)]
        if truth.last_hidden_N_D is not None:
            assert ours.last_hidden_N_D is not None
            pairs.append((ours.last_hidden_N_D, truth.last_hidden_N_D))
        for seen_N_D, true_N_D in pairs:
            torch.testing.assert_close(seen_N_D.norm(dim=1), true_N_D.norm(dim=1))
            if name == "plain":
                assert torch.equal(seen_N_D, true_N_D)
            else:
                cosine_N = torch.cosine_similarity(seen_N_D, true_N_D)
                assert cosine_N.abs().max() < 0.8
            if name != "nothing":
                expected = _logits(plms["ourselves"], true_N_D, ids_C)
                torch.testing.assert_close(_logits(plms[name], seen_N_D, ids_C), expected, rtol=1e-4, atol=1e-4)


def test_what_one_tenant_sees_does_not_fit_what_another_sees(plms: Plms) -> None:
    acme, beta = (plms[name].encode(TEXTS, [0, 0]).cr_N_D for name in ("acme", "beta"))
    assert torch.cosine_similarity(acme, beta).abs().max() < 0.8


def test_policies_are_kept(plms: Plms) -> None:
    part, one = HeadRequest(start=0, stop=2), HeadRequest(token_ids=[4])
    for name, plm in plms.items():
        connection, policy = plm._connection, DISCLOSURES[name].head_policy
        if policy == "full":
            assert connection.lm_head(part).weight_N_D.shape == (2, 32)
            continue
        with pytest.raises(Forbidden, match="owner gives"):
            connection.lm_head(part)
        with pytest.raises(Unsupported, match=f"policy {policy}"):
            plm.full_head()
        if policy == "none":
            with pytest.raises(Forbidden, match="no rows"):
                connection.lm_head(one)
        else:
            assert connection.lm_head(one).weight_N_D.shape == (1, 32)


def test_a_rotated_head_is_cached_under_its_own_name(plms: Plms) -> None:
    ids = torch.arange(VOCAB_SIZE)
    heads = {name: plms[name].full_head() for name in ("ourselves", "whole")}
    for name, head in heads.items():
        torch.testing.assert_close(head.weight_V_D, plms[name].head_rows(ids).weight_V_D)
    assert not torch.allclose(heads["ourselves"].weight_V_D, heads["whole"].weight_V_D)


def test_a_memory_of_one_view_meets_no_other(plms: Plms, tmp_path: Path) -> None:
    task = Task(name="t", source_label="In", target_label="Out")
    pairs = [Pair("the thin", "die"), Pair("an", "on the")]
    build_memories(plms["acme"], task, pairs, tmp_path, validation=pairs)
    settings = TrainingSettings(form="paper", rank=4, epochs=1, selection_texts=0, minutes=0, retrieved_examples=0)
    for name in ("beta", "plain", "ourselves", "nothing"):
        with pytest.raises(IdentityMismatch, match="the server"):
            train(plms[name], tmp_path, tmp_path / "adapter", settings=settings)
    train(plms["acme"], tmp_path, tmp_path / "adapter", settings=settings)
