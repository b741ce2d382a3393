"""Grants of the owner, told before the work over both transports: by the card, `build-memory` and `doctor`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from pathlib import Path

import pytest

from data_owner_client.adapter.candidates import token_set
from data_owner_client.cli.doctor import diagnose
from data_owner_client.data.pairs import Pair
from data_owner_client.data.tasks import Task
from data_owner_client.memory.build_splits import build_memories
from data_owner_client.plm.remote_plm import RemotePlm
from data_owner_client.runtime.progress import Reporter
from data_owner_client.training.inputs import Memories
from data_owner_client.training.settings import TrainingSettings
from data_owner_client.training.train import train
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.admission.ledger import Ledger
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.scopes import SCOPES, Scope
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.tenants.usage import read_usage
from protocol.errors import BudgetExhausted, Forbidden, QuotaExceeded
from tests import guard
from tests.support import serve, serve_over_grpc

TASK = Task(name="t", source_label="In", target_label="Out")
PAIRS = [Pair(f"the {i} thin", f"die {i} Tür{'en' * (i % 4)}") for i in range(11)]
Serve = Callable[..., AbstractContextManager[str]]


class Lines(Reporter):
    def __init__(self) -> None:
        self.said = list[str]()

    def say(self, line: str) -> None:
        self.said.append(line)


class Owner:
    """A server with one tenant, and what that tenant used."""

    def __init__(self, serve: Serve, service: PlmService, folder: Path) -> None:
        self._serve, self._service = serve, service
        self._store = TenantStore(f"sqlite:///{folder}/owner.db")
        self._folder = folder

    @contextmanager
    def grants(
        self, scopes: Sequence[Scope] = SCOPES, quotas: Quotas | None = None, disclosure: Disclosure | None = None
    ) -> Iterator[RemotePlm]:
        """The PLM as a tenant sees it, who was granted these."""
        key = self._store.add("acme", scopes, quotas=quotas or Quotas(), disclosure=disclosure or Disclosure())
        access = TenantKeyAuthenticator(self._store, Ledger(self._store.database))
        with (
            self._serve(self._service, access=access) as url,
            RemotePlm(guard.connection(url, api_key=str(key)), cache=self._folder / "cache") as plm,
        ):
            yield plm

    def limit(self, **quotas: int) -> None:
        """Change the tenant's quotas."""
        self._store.set_quotas("acme", quotas)

    @property
    def tokens(self) -> int:
        """Tokens that the tenant used."""
        return sum(day.tokens for day in read_usage(self._store.database, since=date.min))


@pytest.fixture(params=[serve, serve_over_grpc], ids=["REST", "gRPC"])
def owner(request: pytest.FixtureRequest, tiny_service: PlmService, tmp_path: Path) -> Owner:
    return Owner(request.param, tiny_service, tmp_path)


def build(plm: RemotePlm, folder: Path, *, shared: bool = True) -> list[str]:
    """Build both memories; return what was said."""
    lines = Lines()
    build_memories(
        plm,
        TASK,
        PAIRS,
        folder / "memory",
        validation=PAIRS[:3],
        context_mode="teacher-forced" if shared else "private",
        share_targets=shared,
        reporter=lines,
    )
    return lines.said


def distinct_target_tokens(plm: RemotePlm) -> int:
    """By the formula of the guide: the tokens of all targets with their stops."""
    tokenizer, ids = plm.tokenizer, set[int]()
    for pair in PAIRS:
        prompt, target = TASK.prompt_and_target(pair, tokenizer)
        ids.update(tokenizer.encode_target(prompt, tokenizer.encode_prompt(prompt), target))
    return len(ids)


@pytest.mark.parametrize("scopes", [("card", "encode"), SCOPES])
def test_the_card_has_the_scopes_of_the_key(owner: Owner, scopes: Sequence[Scope]) -> None:
    with owner.grants(scopes) as plm:
        assert plm.card.scopes == sorted(scopes)


def test_without_keys_the_card_has_no_scopes(tiny_service: PlmService) -> None:
    with serve(tiny_service) as url, RemotePlm(guard.connection(url), cache=None) as plm:
        assert plm.card.scopes in ([], sorted(SCOPES))  # a guarded suite has keys everywhere


@pytest.mark.parametrize(
    ("scopes", "shared", "missing", "verb"),
    [
        (("card", "head", "decode"), True, "encode", "build-memory"),
        (("card", "head", "encode"), False, "decode", "build-memory"),
        (("card", "encode", "decode"), True, "head", "train"),
    ],
)
def test_a_missing_scope_is_refused_before_anything_is_sent(
    owner: Owner, tmp_path: Path, scopes: Sequence[Scope], shared: bool, missing: str, verb: str
) -> None:
    with owner.grants(scopes) as plm, pytest.raises(Forbidden, match=f"not allow {missing}, which {verb}") as caught:
        build(plm, tmp_path, shared=shared)
    assert f"scope {missing}" in caught.value.hint
    assert owner.tokens == 0


def test_a_scope_that_only_translating_needs_is_named(owner: Owner, tmp_path: Path) -> None:
    with owner.grants(("card", "head", "encode")) as plm:
        assert any("not allow decode, which translate needs" in line for line in build(plm, tmp_path))


@pytest.mark.parametrize("granted", [0, 1])
def test_too_few_head_rows_are_refused_before_anything_is_sent(owner: Owner, tmp_path: Path, granted: int) -> None:
    with owner.grants(quotas=Quotas(head_rows=granted)) as plm:
        needed = distinct_target_tokens(plm)
        with pytest.raises(Forbidden, match=f"{needed} different tokens, and you may have {granted} rows") as caught:
            build(plm, tmp_path)
        assert f"{needed} head rows" in caught.value.hint
        assert owner.tokens == 0


def test_exactly_as_many_head_rows_as_needed_suffice(owner: Owner, tmp_path: Path) -> None:
    with owner.grants(quotas=Quotas(head_rows=10_000)) as plm:
        needed = distinct_target_tokens(plm)
    exact = Owner(owner._serve, owner._service, _made(tmp_path / "exact"))
    with exact.grants(quotas=Quotas(head_rows=needed)) as plm:
        said = build(plm, tmp_path)
        assert not [line for line in said if "LM head" in line]
        memories = Memories.open(tmp_path / "memory", plm)
        ids_U = token_set([memories.train.load().target_N, memories.held_out.target_N])
        plm.head_rows(ids_U)  # all that was said to suffice
        with pytest.raises(BudgetExhausted):
            plm.head_rows((ids_U + 1) % plm.card.vocab_size)


def test_a_day_that_is_too_short_is_told_with_its_numbers_and_the_build_begins(owner: Owner, tmp_path: Path) -> None:
    with owner.grants(quotas=Quotas(tokens_per_day=100_000)) as plm:
        build(plm, tmp_path)
    cost = owner.tokens
    short = Owner(owner._serve, owner._service, _made(tmp_path / "short"))
    with short.grants(quotas=Quotas(tokens_per_day=cost - 1)) as plm:
        said = build(plm, _made(tmp_path / "again"))
    assert [line for line in said if f"takes {cost} tokens; you may use {cost - 1} in a day" in line]
    assert short.tokens == cost, "the last call below a limit is admitted"


def test_distributions_in_place_of_head_rows_are_counted(owner: Owner, tmp_path: Path) -> None:
    with owner.grants(quotas=Quotas(full_distributions=5), disclosure=Disclosure("none")) as plm:
        said = build(plm, tmp_path)
    assert [line for line in said if "more full distributions" in line and "5 of 5 are left" in line]
    none = Owner(owner._serve, owner._service, _made(tmp_path / "none"))
    with none.grants(quotas=Quotas(full_distributions=0), disclosure=Disclosure("none")) as plm:
        with pytest.raises(Forbidden, match="neither rows of the LM head nor full distributions"):
            build(plm, tmp_path / "none")
        assert none.tokens == 0


def test_train_names_the_tokens_that_are_not_left_today(owner: Owner, tmp_path: Path) -> None:
    with owner.grants() as plm:
        build(plm, tmp_path)
        owner.limit(tokens_per_day=owner.tokens + 200)
        lines, settings = Lines(), TrainingSettings(rank=4, epochs=1, search=False, retrieved_examples=0)
        with pytest.raises(QuotaExceeded):
            train(plm, tmp_path / "memory", tmp_path / "adapter", settings=settings, reporter=lines)
    assert [line for line in lines.said if "are left today. Use fewer --selection-texts" in line]


@pytest.mark.parametrize(
    ("scopes", "ok", "told"),
    [
        (SCOPES, True, "card, decode, distribution, encode, head"),
        (("card", "head", "decode", "encode"), True, "card, decode, encode, head"),
        (("card", "decode", "encode"), False, "the scope head"),
        (("card", "head", "encode"), False, "the scope decode"),
    ],
)
def test_doctor_names_scopes_and_quotas(owner: Owner, scopes: Sequence[Scope], ok: bool, told: str) -> None:
    with owner.grants(scopes, Quotas(head_rows=7)) as plm:
        (finding,) = (each for each in diagnose(lambda: plm).findings if each.check == "grants")
    assert finding.ok is ok
    assert told in finding.detail + finding.advice
    assert "7 of 7 head rows" in finding.detail


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
