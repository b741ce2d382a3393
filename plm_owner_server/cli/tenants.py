"""Command `pema-server tenants`: adds, changes and lists tenants, and shows their usage."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import CliApp, CliImplicitFlag, CliPositionalArg, CliSubCommand

from plm_owner_server.cli.utf8_texts import Utf8Texts
from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.setting_values import Metavar
from plm_owner_server.settings import StoreSettings
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.scopes import SCOPES, Scope
from protocol.errors import InvalidRequest, PemaError
from protocol.types import HeadPolicy

if TYPE_CHECKING:
    from plm_owner_server.tenants.api_keys import Key
    from plm_owner_server.tenants.store import TenantRecord, TenantStore

_LINE = "{:<24} {:<9} {:<17} {:<17} {:<19} {}"


def _default_store() -> str:
    return StoreSettings().store


class _StoreCommand(Utf8Texts):
    # The only option here that is an environment variable, too.
    store: Annotated[str, Metavar("URL")] = Field(
        default_factory=_default_store,
        description="Database of the tenants, as for pema-server serve. By default that of PEMA_STORE, or else a "
        "SQLite file in the user's data folder.",
    )

    def open_store(self) -> TenantStore:
        """Open the store. The database is imported here, so that `--help` need not wait for it."""
        from plm_owner_server.tenants.store import TenantStore

        return TenantStore(self.store)


class _TenantCommand(_StoreCommand):
    name: CliPositionalArg[str] = Field(description="Name of the tenant.")


_Quota = Annotated[int | None, Field(ge=0, le=10**15 - 1)]  # the largest number that the RateLimit fields carry
_Tokens = Annotated[_Quota, Metavar("TOKENS")]
_Requests = Annotated[_Quota, Metavar("REQUESTS")]
_Rows = Annotated[_Quota, Metavar("ROWS")]
_Texts = Annotated[_Quota, Metavar("TEXTS")]
# Several times the rows that a memory of 100,000 pairs needs, and a small share of a large vocabulary.
_CANDIDATE_ROWS = 20_000


# The command line reads `none` as None, because that removes a quota.
_HeadPolicy = Annotated[HeadPolicy, BeforeValidator(lambda value: "none" if value is None else value)]


class _WithDisclosure(_TenantCommand):
    head_policy: _HeadPolicy = Field(
        default="candidate",
        description="Rows of the LM head that it may have: all (full), those of tokens that it names (candidate), or "
        "none.",
    )
    rotation: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Show it representations and rows in a secret basis, with all logits unchanged. auto is on for "
        "candidate.",
    )

    @property
    def disclosure(self) -> Disclosure:
        """The disclosure that the options describe."""
        rotated = self.head_policy == "candidate" if self.rotation == "auto" else self.rotation == "on"
        return Disclosure(self.head_policy, rotated)


class _WithQuotas(_TenantCommand):
    tokens_per_minute: _Tokens = Field(default=None, description="Tokens in each of the clock's minutes.")
    tokens_per_day: _Tokens = Field(default=None, description="Tokens in each day of UTC.")
    concurrent_requests: _Requests = Field(
        default=None, description="Requests at the same time, on all servers together."
    )
    head_rows: _Rows = Field(default=None, description="Different rows of the LM head, ever.")
    full_distributions: _Texts = Field(
        default=None,
        description="Different texts whose full distribution (more than 100 tokens of it) it may have, ever.",
    )

    def quotas(self) -> dict[str, int | None]:
        """The quotas that the command line sets, by field name of `Quotas`."""
        return {
            field.name: getattr(self, field.name) for field in fields(Quotas) if field.name in self.model_fields_set
        }


class Add(_WithQuotas, _WithDisclosure):
    """Add a tenant, and print its key, which is shown only now.

    By default there are no quotas, except that the policy candidate allows 20,000 rows of the LM head, ever.

    Examples:
      pema-server tenants add acme
      pema-server tenants add acme --scopes card,head,encode,decode
      pema-server tenants add acme --tokens-per-minute 100000 --head-rows 50000 --full-distributions 0
      pema-server tenants add ourselves --head-policy full
    """

    scopes: Annotated[list[Scope], Metavar("SCOPE,...")] = Field(
        default=list(SCOPES), min_length=1, description="Calls that it may make, separated by commas."
    )

    def cli_cmd(self) -> None:
        """Add the tenant."""
        rows = {"head_rows": _CANDIDATE_ROWS} if self.head_policy == "candidate" else {}
        quotas = Quotas(**rows | self.quotas())
        key = self.open_store().add(self.name, self.scopes, disclosure=self.disclosure, quotas=quotas)
        _show_key(self.name, key)


class SetDisclosure(_WithDisclosure):
    """Change what a tenant sees of the model. It must then build its memories and train its adapters again.

    Its quotas stay: a tenant added with the policy candidate still has 20,000 rows of the LM head.

    Examples:
      pema-server tenants set-disclosure acme --head-policy candidate --rotation off
      pema-server tenants set-disclosure acme --head-policy full && pema-server tenants set-quotas acme --head-rows none
    """

    def cli_cmd(self) -> None:
        """Change the disclosure."""
        if "head_policy" not in self.model_fields_set:
            raise InvalidRequest("No policy was given.", hint="Say --head-policy, also where it stays as it is.")
        self.open_store().set_disclosure(self.name, self.disclosure)


class SetQuotas(_WithQuotas):
    """Change the quotas that are named, from the tenant's next call on. `none` removes one, 0 allows nothing.

    Examples:
      pema-server tenants set-quotas acme --tokens-per-day 2000000 --concurrent-requests 8
      pema-server tenants set-quotas acme --tokens-per-minute none
    """

    def cli_cmd(self) -> None:
        """Change the quotas."""
        if not self.quotas():
            raise InvalidRequest("No quota was given.", hint="See pema-server tenants set-quotas --help.")
        self.open_store().set_quotas(self.name, self.quotas())


class Usage(_StoreCommand):
    """Print tenants' usage by day (UTC): requests answered and refused, tokens, new rows and distributions.

    Examples:
      pema-server tenants usage
      pema-server tenants usage acme --days 7 --csv
    """

    name: CliPositionalArg[str | None] = Field(default=None, description="Name of the tenant. All by default.")
    days: Annotated[int, Metavar("DAYS")] = Field(
        default=30, ge=1, le=36_500, description="Number of days, today included."
    )
    as_csv: CliImplicitFlag[bool] = Field(default=False, alias="csv", description="Print CSV.")
    as_json: CliImplicitFlag[bool] = Field(default=False, alias="json", description="Print JSON.")

    def cli_cmd(self) -> None:
        """Print the usage."""
        from plm_owner_server.tenants import usage

        store = self.open_store()
        if self.name is not None and self.name not in {tenant.name for tenant in store.all()}:
            raise InvalidRequest(f"There is no tenant {self.name}.", hint="See pema-server tenants list.")
        since = datetime.now(UTC).date() - timedelta(days=self.days - 1)
        days = usage.read_usage(store.database, since=since, tenant=self.name)
        form = usage.as_json if self.as_json else usage.as_csv if self.as_csv else usage.as_table
        sys.stdout.write(form(days))


class RotateKey(_TenantCommand):
    """Give a tenant a new key, shown only now. Running servers accept the old one for two more seconds."""

    def cli_cmd(self) -> None:
        """Rotate the key."""
        _show_key(self.name, self.open_store().rotate_key(self.name))


class Disable(_TenantCommand):
    """Refuse a tenant's calls. Running servers admit it for two more seconds."""

    def cli_cmd(self) -> None:
        """Disable the tenant."""
        self.open_store().disable(self.name)


class Enable(_TenantCommand):
    """Admit a disabled tenant again, with the key that it has."""

    def cli_cmd(self) -> None:
        """Enable the tenant."""
        self.open_store().enable(self.name)


class ListAll(_StoreCommand):
    """List all tenants. Only the public part of a key is stored, and shown."""

    as_json: CliImplicitFlag[bool] = Field(default=False, alias="json", description="Print JSON.")

    def cli_cmd(self) -> None:
        """List the tenants."""
        tenants = self.open_store().all()
        if self.as_json:
            sys.stdout.write(json.dumps([asdict(tenant) for tenant in tenants], default=str, indent=1) + "\n")
            return
        rows = [_LINE.format("NAME", "STATE", "KEY", "SINCE (UTC)", "LM HEAD", "SCOPES"), *map(_line, tenants)]
        sys.stdout.write("".join(f"{row}\n" for row in rows))


class Tenants(BaseModel):
    """Manage the tenants of this server: their keys, scopes, disclosure, quotas and usage.

    Examples:
      pema-server tenants add acme --scopes card,head,encode,decode
      pema-server tenants list
      pema-server tenants rotate-key acme
      pema-server tenants set-quotas acme --tokens-per-day 2000000
      pema-server tenants usage acme --days 7 --csv
      PEMA_STORE=postgresql+psycopg://owner@db/pema pema-server tenants disable acme
    """

    add: CliSubCommand[Add]
    list_all: CliSubCommand[ListAll] = Field(alias="list")
    set_quotas: CliSubCommand[SetQuotas]
    usage: CliSubCommand[Usage]
    rotate_key: CliSubCommand[RotateKey]
    set_disclosure: CliSubCommand[SetDisclosure]
    disable: CliSubCommand[Disable]
    enable: CliSubCommand[Enable]

    def cli_cmd(self) -> None:
        """Run the subcommand."""
        CliApp.run_subcommand(self)


def _show_key(name: str, key: Key) -> None:
    """Print the key alone on standard output, for scripts.

    Raises:
        PemaError: standard output takes nothing.
    """
    try:
        print(key, flush=True)
    except OSError as error:
        raise PemaError(
            f"The key of {name} could not be printed: {error.strerror}.",
            hint=f"Nobody has it. Get another: pema-server tenants rotate-key {name}",
        ) from error
    sys.stderr.write(f"That is the key of {name}. It is stored nowhere: hand it over now, as PEMA_API_KEY.\n")


def _line(tenant: TenantRecord) -> str:
    state = "disabled" if tenant.disabled_at else "active"
    since = f"{tenant.created_at:%Y-%m-%d %H:%M}"
    head = tenant.disclosure.head_policy + (", rotated" if tenant.disclosure.rotated else "")
    return _LINE.format(tenant.name, state, tenant.key_id, since, head, " ".join(tenant.scopes))
