"""`pema-server tenants`: who may call, from the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import CliApp, CliImplicitFlag, CliPositionalArg, CliSubCommand

from plm_owner_server.service.disclosure import Disclosure
from plm_owner_server.settings import StoreSettings
from plm_owner_server.tenants import usage
from plm_owner_server.tenants.api_keys import Key
from plm_owner_server.tenants.quotas import Quotas
from plm_owner_server.tenants.store import SCOPES, Scope, TenantRecord, TenantStore
from protocol.errors import InvalidRequest
from protocol.types import HeadPolicy

_LINE = "{:<24} {:<9} {:<17} {:<17} {:<19} {}"


class _OfStore(BaseModel):
    # Of these options only this one is an environment variable, too.
    store: str = Field(
        default_factory=lambda: StoreSettings().store, description="Database of the tenants, as for pema-server serve."
    )


class _OfTenant(_OfStore):
    name: CliPositionalArg[str] = Field(description="The tenant.")


_Quota = Annotated[int | None, Field(ge=0, le=10**15 - 1)]  # as large as header fields can tell
# Several times what a memory of a hundred thousand pairs needs, and a small share of a large vocabulary.
_CANDIDATE_ROWS = 20_000


# The command line reads `none` as None, which is what takes a quota away.
_HeadPolicy = Annotated[HeadPolicy, BeforeValidator(lambda given: "none" if given is None else given)]


class _WithDisclosure(_OfTenant):
    head_policy: _HeadPolicy = Field(
        default="candidate",
        description="Rows of the LM head it may have: all (full), only those of tokens that it names (candidate), or "
        "none.",
    )
    rotation: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether it sees representations and rows in a secret basis of its own; all logits stay as they "
        "are. auto: on for candidate.",
    )

    @property
    def disclosure(self) -> Disclosure:
        """What it may see of the model."""
        rotated = self.head_policy == "candidate" if self.rotation == "auto" else self.rotation == "on"
        return Disclosure(self.head_policy, rotated)


class _WithQuotas(_OfTenant):
    tokens_per_minute: _Quota = Field(default=None, description="Tokens in each of the clock's minutes.")
    tokens_per_day: _Quota = Field(default=None, description="Tokens in each day of UTC.")
    concurrent_requests: _Quota = Field(default=None, description="Requests at the same time, over all servers.")
    head_rows: _Quota = Field(default=None, description="Different rows of the LM head, ever.")
    full_distributions: _Quota = Field(
        default=None, description="Texts whose full distribution (more than 100 tokens of it) it may have, ever."
    )

    def quotas(self) -> dict[str, int | None]:
        """Those that were given."""
        return {
            field.name: getattr(self, field.name) for field in fields(Quotas) if field.name in self.model_fields_set
        }


class Add(_WithQuotas, _WithDisclosure):
    """Let a tenant in, and print its key, which is shown only now.

    Without quotas it may use as much as it likes, but for the policy candidate: 20,000 rows of the LM head, ever.

    Examples:
      pema-server tenants add acme
      pema-server tenants add acme --scopes card,head,encode,decode
      pema-server tenants add acme --tokens-per-minute 100000 --head-rows 50000 --full-distributions 0
      pema-server tenants add ourselves --head-policy full
    """

    scopes: list[Scope] = Field(default=list(SCOPES), min_length=1, description="What it may call.")

    def cli_cmd(self) -> None:
        """Add it."""
        rows = {"head_rows": _CANDIDATE_ROWS} if self.head_policy == "candidate" else {}
        quotas = Quotas(**rows | self.quotas())
        key = TenantStore(self.store).add(self.name, self.scopes, disclosure=self.disclosure, quotas=quotas)
        _show_key(self.name, key)


class Disclose(_WithDisclosure):
    """Let a tenant see more or less of the model; its memories and adapters fit no more, and have to be made anew.

    Its quotas stay as they are: who was added with the policy candidate goes on having 20,000 rows of the LM head.

    Examples:
      pema-server tenants disclose acme --head-policy candidate --rotation off
      pema-server tenants disclose acme --head-policy full && pema-server tenants limit acme --head-rows none
    """

    def cli_cmd(self) -> None:
        """Change it."""
        if "head_policy" not in self.model_fields_set:
            raise InvalidRequest("No policy was given.", hint="Say --head-policy, also where it stays as it is.")
        TenantStore(self.store).disclose(self.name, self.disclosure)


class Limit(_WithQuotas):
    """Change the quotas that are given, from the tenant's next call on; `none` takes one away, 0 allows nothing.

    Examples:
      pema-server tenants limit acme --tokens-per-day 2000000 --concurrent-requests 8
      pema-server tenants limit acme --tokens-per-minute none
    """

    def cli_cmd(self) -> None:
        """Change them."""
        if not self.quotas():
            raise InvalidRequest("No quota was given.", hint="See pema-server tenants limit --help.")
        TenantStore(self.store).limit(self.name, self.quotas())


class Usage(_OfStore):
    """Tell what tenants have used, day by day (UTC): requests answered and refused, tokens, new rows and distributions.

    Examples:
      pema-server tenants usage
      pema-server tenants usage acme --days 7 --csv
    """

    name: CliPositionalArg[str | None] = Field(default=None, description="The tenant; all unless given.")
    days: int = Field(default=30, ge=1, le=36_500, description="Days until today.")
    as_csv: CliImplicitFlag[bool] = Field(default=False, alias="csv", description="Print CSV.")
    as_json: CliImplicitFlag[bool] = Field(default=False, alias="json", description="Print JSON.")

    def cli_cmd(self) -> None:
        """Tell it."""
        store = TenantStore(self.store)
        if self.name is not None and self.name not in {tenant.name for tenant in store.all()}:
            raise InvalidRequest(f"There is no tenant {self.name}.", hint="See pema-server tenants list.")
        since = datetime.now(UTC).date() - timedelta(days=self.days - 1)
        used = usage.read_usage(store.database, since=since, tenant=self.name)
        form = usage.as_json if self.as_json else usage.as_csv if self.as_csv else usage.as_table
        sys.stdout.write(form(used))


class RotateKey(_OfTenant):
    """Give a tenant a new key, shown only now; running servers know the old one for two seconds more."""

    def cli_cmd(self) -> None:
        """Rotate it."""
        _show_key(self.name, TenantStore(self.store).rotate_key(self.name))


class Disable(_OfTenant):
    """Let a tenant in no more; running servers do for two seconds more."""

    def cli_cmd(self) -> None:
        """Disable it."""
        TenantStore(self.store).disable(self.name)


class Enable(_OfTenant):
    """Let a disabled tenant in again, with the key that it has."""

    def cli_cmd(self) -> None:
        """Enable it."""
        TenantStore(self.store).enable(self.name)


class ListAll(_OfStore):
    """List all tenants. Of their keys only the public part is known."""

    as_json: CliImplicitFlag[bool] = Field(default=False, alias="json", description="Print JSON.")

    def cli_cmd(self) -> None:
        """List them."""
        tenants = TenantStore(self.store).all()
        if self.as_json:
            sys.stdout.write(json.dumps([asdict(tenant) for tenant in tenants], default=str, indent=1) + "\n")
            return
        rows = [_LINE.format("NAME", "STATE", "KEY", "SINCE (UTC)", "LM HEAD", "SCOPES"), *map(_line, tenants)]
        sys.stdout.write("".join(f"{row}\n" for row in rows))


class Tenants(BaseModel):
    """Who may call this server: tenants, their keys, what each of them may do and use.

    Examples:
      pema-server tenants add acme --scopes card,head,encode,decode
      pema-server tenants list
      pema-server tenants rotate-key acme
      pema-server tenants limit acme --tokens-per-day 2000000
      pema-server tenants usage acme --days 7 --csv
      PEMA_STORE=postgresql+psycopg://owner@db/pema pema-server tenants disable acme
    """

    add: CliSubCommand[Add]
    list_all: CliSubCommand[ListAll] = Field(alias="list")
    limit: CliSubCommand[Limit]
    usage: CliSubCommand[Usage]
    rotate_key: CliSubCommand[RotateKey]
    disclose: CliSubCommand[Disclose]
    disable: CliSubCommand[Disable]
    enable: CliSubCommand[Enable]

    def cli_cmd(self) -> None:
        """Run the subcommand."""
        CliApp.run_subcommand(self)


def _show_key(name: str, key: Key) -> None:
    """The key alone on standard output, so that a script can take it."""
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"That is the key of {name}. It is kept nowhere: hand it over now, as PEMA_API_KEY.\n")


def _line(tenant: TenantRecord) -> str:
    state = "disabled" if tenant.disabled_at else "active"
    since = f"{tenant.created_at:%Y-%m-%d %H:%M}"
    head = tenant.disclosure.head_policy + (", rotated" if tenant.disclosure.rotated else "")
    return _LINE.format(tenant.name, state, tenant.key_id, since, head, " ".join(tenant.scopes))
