"""`pema-server tenants`, and a server that asks for their keys, as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.tiny_models import TinyModels
from plm_owner_server.tenants.store import TenantStore
from tests.processes.parties import client, server


def pema_server(store: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plm_owner_server.cli", *arguments]
    environment = os.environ | {"PEMA_STORE": store}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.unguarded("clients show no key, and those of a tenant that is made on the way")
def test_an_owner_lets_a_tenant_in_and_out(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"sqlite:///{tmp_path}/owner.db"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no head of this model from another test
    added = pema_server(store, "tenants", "add", "acme", "--scopes", "card,decode")
    key = added.stdout.strip()
    assert key.startswith("pema_")
    assert "stored nowhere" in added.stderr
    (listed,) = json.loads(pema_server(store, "tenants", "list", "--json").stdout)
    assert (listed["name"], listed["scopes"], listed["disabled_at"]) == ("acme", ["card", "decode"], None)
    assert key not in pema_server(store, "tenants", "list").stdout
    again = pema_server(store, "tenants", "add", "acme")
    assert again.returncode == 1
    assert "rotate-key" in again.stderr
    mistaken = pema_server(store, "tenants", "add", "beta", "--scopes", "everything")
    assert mistaken.returncode != 0
    assert "--scopes" in mistaken.stderr
    half = pema_server(store, "serve", "--tls-key", "server.key")
    assert half.returncode == 1
    assert "--tls-certificate and --tls-key go together. See pema-server serve" in half.stderr

    log = tmp_path / "server.log"
    flags = ["--model", str(tiny_models["llama"]), "--store", store]
    with server(log, *flags, module="tests.processes.impatient_server") as url:
        refused = client(url, "info")
        assert refused.returncode == 1
        assert "PEMA_API_KEY" in refused.stderr
        monkeypatch.setenv("PEMA_API_KEY", key)
        TenantStore(store).set_quotas("acme", {"tokens_per_day": 1000})
        info = json.loads(client(url, "info", "--json").stdout)
        assert (info["head_policy"], info["rotated"]) == ("candidate", True)  # what tenants see unless more is said
        left = {name: (quota["left"], quota["quota"], quota["unit"]) for name, quota in info["left"].items()}
        assert left == {"day": (1000, 1000, "tokens"), "head-rows": (20_000, 20_000, "head-rows")}
        assert pema_server(store, "tenants", "set-disclosure", "acme", "--head-policy", "full").returncode == 0
        forbidden = client(url, "fetch-head")
        assert forbidden.returncode == 1
        assert "needs the scope head" in forbidden.stderr
        assert pema_server(store, "tenants", "disable", "acme").returncode == 0
        assert "got another one" in client(url, "info").stderr
    assert key.rpartition("_")[2] not in log.read_text()


def test_without_keys_a_server_listens_on_loopback_alone(tiny_models: TinyModels, tmp_path: Path) -> None:
    flags = ["--host", "0.0.0.0", "--model", str(tiny_models["llama"])]  # noqa: S104
    done = pema_server(f"sqlite:///{tmp_path}/owner.db", "serve", *flags)
    assert done.returncode == 1
    assert "any client that reaches 0.0.0.0" in done.stderr
    assert "Traceback" not in done.stderr
