"""`pema-server tenants`: who may call, from the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from pydantic import BaseModel, Field
from pydantic_settings import CliApp, CliImplicitFlag, CliPositionalArg, CliSubCommand

from plm_owner_server.settings import StoreSettings
from plm_owner_server.tenants.keys import Key
from plm_owner_server.tenants.store import SCOPES, Scope, TenantRecord, TenantStore

_LINE = "{:<24} {:<9} {:<17} {:<17} {}"


class _OfStore(BaseModel):
    # Of these options only this one is an environment variable, too.
    store: str = Field(
        default_factory=lambda: StoreSettings().store, description="Database of the tenants, as for pema-server serve."
    )


class _OfTenant(_OfStore):
    name: CliPositionalArg[str] = Field(description="The tenant.")


class Add(_OfTenant):
    """Let a tenant in, and print its key, which is shown only now.

    Examples:
      pema-server tenants add acme
      pema-server tenants add acme --scopes card,head,encode,decode
    """

    scopes: list[Scope] = Field(default=list(SCOPES), min_length=1, description="What it may call.")

    def cli_cmd(self) -> None:
        """Add it."""
        _show_key(self.name, TenantStore(self.store).add(self.name, self.scopes))


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
        rows = [_LINE.format("NAME", "STATE", "KEY", "SINCE (UTC)", "SCOPES"), *map(_line, tenants)]
        sys.stdout.write("".join(f"{row}\n" for row in rows))


class Tenants(BaseModel):
    """Who may call this server: tenants, their keys, what each of them may do.

    Examples:
      pema-server tenants add acme --scopes card,head,encode,decode
      pema-server tenants list
      pema-server tenants rotate-key acme
      PEMA_STORE=postgresql+psycopg://owner@db/pema pema-server tenants disable acme
    """

    add: CliSubCommand[Add]
    list_all: CliSubCommand[ListAll] = Field(alias="list")
    rotate_key: CliSubCommand[RotateKey]
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
    return _LINE.format(tenant.name, state, tenant.key_id, since, " ".join(tenant.scopes))
