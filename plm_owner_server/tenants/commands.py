"""`pema-server tenants`: who may call, from the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_settings import CliApp, CliImplicitFlag, CliPositionalArg, CliSubCommand

from plm_owner_server.settings import StoreSettings
from plm_owner_server.tenants.keys import Key
from plm_owner_server.tenants.store import SCOPES, Scope, TenantRecord, TenantStore
from plm_owner_server.views import Disclosure
from protocol.messages import HeadPolicy

_LINE = "{:<24} {:<9} {:<17} {:<17} {:<19} {}"


class _OfStore(BaseModel):
    # Of these options only this one is an environment variable, too.
    store: str = Field(
        default_factory=lambda: StoreSettings().store, description="Database of the tenants, as for pema-server serve."
    )


class _OfTenant(_OfStore):
    name: CliPositionalArg[str] = Field(description="The tenant.")


class _WithDisclosure(_OfTenant):
    head_policy: HeadPolicy = Field(
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


class Add(_WithDisclosure):
    """Let a tenant in, and print its key, which is shown only now.

    Examples:
      pema-server tenants add acme
      pema-server tenants add acme --scopes card,head,encode,decode
      pema-server tenants add ourselves --head-policy full
    """

    scopes: list[Scope] = Field(default=list(SCOPES), min_length=1, description="What it may call.")

    def cli_cmd(self) -> None:
        """Add it."""
        _show_key(self.name, TenantStore(self.store).add(self.name, self.scopes, self.disclosure))


class Disclose(_WithDisclosure):
    """Let a tenant see more or less of the model; its memories and adapters fit no more, and have to be made anew.

    Examples:
      pema-server tenants disclose acme --head-policy candidate --rotation off
    """

    def cli_cmd(self) -> None:
        """Change it."""
        TenantStore(self.store).disclose(self.name, self.disclosure)


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
