"""Head policy `none`: the rows that the client works out are the model's own, and training with them is the same."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from data_owner_client import Pair, TrainingReport, TrainingSettings, build_memories, evaluate, train
from data_owner_client.cli.doctor import diagnose
from data_owner_client.data.tasks import Task
from data_owner_client.memory.store import ExternalMemory
from data_owner_client.memory.types import ContextMode
from data_owner_client.plm.head_recovery.fit import contexts_needed, fit_rows
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.head_distributions import fetch_distributions
from harness.tiny_models import VOCAB_SIZE, TinyModels
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.service.requests import CallContext
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.tenants.usage import DayOfUsage, read_usage
from protocol.errors import BudgetExhausted, Forbidden, InvalidData, QuotaExceeded
from protocol.messages import HeadRequest
from tests import guard
from tests.support import make_service, random_ids, serve, serve_over_grpc

TASK = Task(name="t", source_label="In", target_label="Out")
WORDS = ["the", "thin", "die", "Tür", "an", "on", "shine", "reden", "her"]
PAIRS = [Pair(" ".join(WORDS[i % 9 :][: 2 + i % 4]), " ".join(WORDS[(3 * i) % 7 :][: 1 + i % 3])) for i in range(24)]
UNSEEN = [Pair("thin on her", "Öl, her"), Pair("the die", "Quark")]
SETTINGS = TrainingSettings(rank=8, epochs=2, batch_rows=16, retrieved_examples=0, selection_texts=0, minutes=0)
NONE = Disclosure("none")
ALL_TOKENS = torch.arange(VOCAB_SIZE)


class Lines(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


class Owner:
    """Serves a model over both transports, and knows its tenants by name."""

    def __init__(self, service: PlmService, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.store = TenantStore(f"sqlite:///{folder}/owner.db")
        access = TenantKeyAuthenticator(self.store)
        self._urls = {
            name: stack.enter_context(serving(service, access=access))
            for name, serving in (("REST", serve), ("gRPC", serve_over_grpc))
        }
        self._keys: dict[str, str] = {}

    def plm(self, tenant: str, disclosure: Disclosure, *, transport: str = "REST", **arguments: Any) -> RemotePlm:
        """The model as a tenant sees it, with a cache of its own."""
        if tenant not in self._keys:
            self._keys[tenant] = str(self.store.add(tenant, disclosure=disclosure, **arguments))
        cache = self._folder / "cache" / tenant
        connection = guard.connection(self._urls[transport], api_key=self._keys[tenant], retry_for=0.1)
        return self._stack.enter_context(RemotePlm(connection, dtype="float32", cache=cache))

    def distributions(self, tenant: str) -> int:
        """Number of different distributions that a tenant received."""
        return sum(day.full_distributions for day in self.usage(tenant))

    def usage(self, tenant: str) -> list[DayOfUsage]:
        return read_usage(self.store.database, since=date.min, tenant=tenant)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def owner(tiny_service: PlmService, tmp_path: Path, stack: ExitStack) -> Owner:
    return Owner(tiny_service, tmp_path, stack)


def built(plm: RemotePlm, folder: Path, *, shared: bool = True) -> Path:
    mode: ContextMode = "teacher-forced" if shared else "private"
    build_memories(plm, TASK, PAIRS, folder, validation=PAIRS[:4], context_mode=mode, share_targets=shared)
    return folder


def asked(plm: RemotePlm, memory: Path, wanted: int | None = None) -> None:
    part = ExternalMemory(memory / "train")
    fetch_distributions(plm, part.manifest.plan, part.pairs(), wanted, Reporter())


@pytest.mark.parametrize(
    ("transport", "rotated", "shared"),
    [("REST", False, True), ("gRPC", True, False)],
    ids=["REST", "gRPC, rotated, private"],
)
def test_training_is_that_of_the_policy_candidate(
    owner: Owner, tiny_service: PlmService, tmp_path: Path, transport: str, rotated: bool, shared: bool
) -> None:
    lines, reports, plms, adapters = Lines(), dict[str, TrainingReport](), dict[str, RemotePlm](), {}
    for policy in ("candidate", "none"):
        plm = plms[policy] = owner.plm(policy, Disclosure(policy, rotated=rotated), transport=transport)
        memory = built(plm, tmp_path / policy, shared=shared)
        adapters[policy], reports[policy] = train(plm, memory, memory / "adapter", settings=SETTINGS, reporter=lines)
    for name in ("plm_nll", "mixture_nll"):
        candidate, none = (reports[policy].card.validation[name] for policy in ("candidate", "none"))
        assert none == pytest.approx(candidate, abs=1e-3)
    # What an accomplice of the same tenant's, with the policy `full`, would be given.
    ids_C = adapters["none"].candidate_ids_C
    accomplice = CallContext("none", "none", Disclosure("full", rotated=rotated))
    true = tiny_service.lm_head(HeadRequest(token_ids=ids_C.tolist(), dtype="float32"), accomplice)
    torch.testing.assert_close(adapters["none"].head.weight_V_D, true.weight_N_D, rtol=0, atol=1e-3)
    exchange = reports["none"].exchange
    assert exchange is not None
    assert (exchange.head_rows, exchange.distributions) == (0, 48)
    told = " ".join(lines.said)
    assert "only contexts that building the memory has shown. Costs 48 calls" in told
    assert "recovered from 45 full distributions" in told
    if shared:
        # Also of tokens that are no candidates.
        found = [evaluate(plms[policy], UNSEEN, adapters[policy], share_targets=True).perplexity for policy in plms]
        by_candidate, by_none = found
        assert by_candidate is not None
        assert by_none is not None
        assert by_none.coverage < 1
        assert by_none.plm == pytest.approx(by_candidate.plm, rel=1e-3)
        assert by_none.mixture == pytest.approx(by_candidate.mixture, rel=1e-3)
    assert owner.distributions("none") == contexts_needed(plm.card) == 48


# A head with a bias, with a scale, with a soft-cap; a representation that is not the head's input.
@pytest.mark.parametrize(
    ("architecture", "cr_kind"),
    [
        ("phi", "last_hidden_state"),
        ("cohere", "last_hidden_state"),
        pytest.param("gemma2", "ffn_output", marks=pytest.mark.transformers_only(reason="only it has these")),
    ],
)
def test_logits_are_the_models_own(
    architecture: str, cr_kind: str, tiny_models: TinyModels, tmp_path: Path, stack: ExitStack
) -> None:
    folder = shutil.copytree(tiny_models[architecture], tmp_path / architecture)
    if architecture == "gemma2":
        # As the real one's: of logits at the bound itself nobody can tell what they come from.
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 10.0}))
    service = make_service(folder, cr_kind=cr_kind)
    plm = Owner(service, tmp_path, stack).plm("acme", Disclosure("none", rotated=True))
    asked(plm, built(plm, tmp_path / "memory"), 80)
    contexts = random_ids(5, [7] * 20)
    seen = plm.decode(contexts, [0] * len(contexts))
    input_N_D = seen.cr_N_D if seen.last_hidden_N_D is None else seen.last_hidden_N_D
    fitted = fit_rows(plm.cached_distributions(), ALL_TOKENS)
    logprob_N_V = fitted.head.logits(input_N_D) - seen.logsumexp_N[:, None]
    true_N_V = torch.stack([plm.distribution(ids) for ids in contexts])
    torch.testing.assert_close(logprob_N_V, true_N_V, rtol=0, atol=5e-3)
    assert fitted.error < 1e-3


def test_a_budget_that_ends_loses_nothing(owner: Owner, tmp_path: Path) -> None:
    plm = owner.plm("acme", NONE)
    memory = built(plm, tmp_path / "memory")
    owner.store.set_quotas("acme", {"full_distributions": 20})
    with pytest.raises(BudgetExhausted, match="Of 48 full distributions, 20 are stored") as caught:
        train(plm, memory, tmp_path / "adapter", settings=SETTINGS)
    assert "--head-contexts 20" in caught.value.hint
    assert "goes on where" in caught.value.hint
    # Nobody who asks for so few is refused; but of random weights, half of the directions are no estimate.
    few = TrainingSettings(**{**vars(SETTINGS), "head_contexts": 20})
    with pytest.raises(InvalidData, match="too far off") as too_few:
        train(plm, memory, tmp_path / "adapter", settings=few)
    assert "--head-contexts 48" in too_few.value.hint
    assert owner.distributions("acme") == 20
    owner.store.set_quotas("acme", {"full_distributions": None})
    calls = list[str]()
    with plm.observed_by(lambda exchange: calls.append(exchange.call)):
        train(plm, memory, tmp_path / "adapter", settings=SETTINGS)
    assert owner.distributions("acme") == 48
    assert sum("istribution" in call for call in calls) == 28


def test_an_answer_in_flight_beside_a_refusal_is_stored(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call is refused after the second one is answered."""
    plm = owner.plm("acme", NONE)
    memory = built(plm, tmp_path / "memory")
    answered, calls, distribution = threading.Event(), count(), RemotePlm.distribution

    def refuse_the_first(self: RemotePlm, token_ids: list[int]) -> torch.Tensor:
        if next(calls) == 0:
            assert answered.wait(30)
            raise Forbidden("no more")
        result = distribution(self, token_ids)
        answered.set()
        return result

    monkeypatch.setattr(RemotePlm, "distribution", refuse_the_first)
    with pytest.raises(Forbidden, match="are stored"):
        asked(plm, memory)
    kept = len(plm.cached_distributions().keys())
    assert kept == owner.distributions("acme") > 0
    asked(plm, memory, kept)  # As its hint says; the refused context is not among those on disk.
    assert owner.distributions("acme") == kept


def test_a_share_that_is_used_up_loses_nothing(owner: Owner, tmp_path: Path) -> None:
    plm = owner.plm("acme", NONE)
    memory = built(plm, tmp_path / "memory")
    used = sum(day.tokens for day in owner.usage("acme"))
    owner.store.set_quotas("acme", {"tokens_per_day": used + 500})
    with pytest.raises(QuotaExceeded, match="are stored") as caught:
        asked(plm, memory)
    assert caught.value.retry_after_s
    kept = len(plm.cached_distributions().keys())
    assert 0 < kept < 48
    assert f"Of 48 full distributions, {kept} are" in caught.value.detail
    owner.store.set_quotas("acme", {"tokens_per_day": None})
    asked(plm, memory)
    assert len(plm.cached_distributions().keys()) == owner.distributions("acme") == 48


def test_who_may_have_no_distributions_is_told_so(owner: Owner, tmp_path: Path) -> None:
    plm = owner.plm("acme", NONE, scopes=("card", "encode", "decode"))
    with pytest.raises(Forbidden, match="distribution") as caught:
        asked(plm, built(plm, tmp_path / "memory"))
    assert "--head-contexts" not in caught.value.hint


def test_without_distributions_there_are_no_rows(owner: Owner) -> None:
    plm = owner.plm("acme", NONE)
    with pytest.raises(InvalidData, match="gives no rows") as caught:
        plm.head_rows(torch.tensor([5]))
    assert "train" in caught.value.hint
    (finding,) = [each for each in diagnose(lambda: owner.plm("acme", NONE)).findings if each.check == "LM head"]
    assert "gives no rows; 0 full distributions" in finding.detail
    assert "48" in finding.advice


def test_a_damaged_answer_is_asked_for_again(owner: Owner, tmp_path: Path) -> None:
    plm = owner.plm("acme", NONE)
    memory = built(plm, tmp_path / "memory")
    asked(plm, memory)
    truth = plm.head_rows(ALL_TOKENS).weight_V_D
    path = sorted(plm.cached_distributions().folder.iterdir())[7]
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidData, match="damaged, and was deleted"):
        plm.head_rows(ALL_TOKENS)
    asked(plm, memory)
    torch.testing.assert_close(plm.head_rows(ALL_TOKENS).weight_V_D, truth, rtol=0, atol=1e-3)
