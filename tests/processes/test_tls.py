"""TLS on both transports, with certificates that are renewed while the server runs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_owner_client import connect
from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.open import open_connection
from harness.processes import free_port
from harness.tiny_models import TinyModels
from plm_owner_server.admission.authentication import authenticator_for
from plm_owner_server.admission.client_certificates import certificate_authenticator_for
from plm_owner_server.settings import ServerSettings
from plm_owner_server.tenants.store import TenantStore
from plm_owner_server.transports.tls import Certificate
from protocol.errors import ConnectionFailed, Forbidden, InvalidRequest, PemaError, Unauthenticated, Untrusted
from protocol.messages import HeadRequest
from tests import support
from tests.guard import Authority
from tests.processes.parties import client, server

IMPATIENT = "tests.processes.impatient_server"
until = partial(support.until, within_s=30)


def test_both_transports_speak_tls_and_take_a_renewed_certificate(tiny_models: TinyModels, tmp_path: Path) -> None:
    files = Certificate(tmp_path / "server.pem", tmp_path / "server.key")
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    first.sign(files)
    store = f"sqlite:///{tmp_path}/owner.db"
    key, port = str(TenantStore(store).add("acme")), free_port()
    flags = ["--model", str(tiny_models["llama"]), "--store", store]
    flags += ["--tls-certificate", str(files.chain), "--tls-key", str(files.key), "--transfer-timeout", "5"]
    log = tmp_path / "server.log"
    with (
        server(log, *flags, grpc_port=port, ca=first.file, module=IMPATIENT) as rest,
        # One that never shakes hands: its own time-out is longer than the server's.
        socket.create_connection(("127.0.0.1", int(rest.rpartition(":")[2])), timeout=40) as silent,
    ):
        urls = [rest, f"grpcs://127.0.0.1:{port}"]

        def card_names(authority: Authority | None) -> list[str]:
            names = []
            for url in urls:
                with connect(url, api_key=key, ca=authority and authority.file, retry_for=0) as plm:
                    names.append(plm.card.name)
            return names

        assert len(card_names(first)) == 2
        for url, stranger in ((url, other) for url in urls for other in (None, second)):
            with pytest.raises(Untrusted, match="cannot be trusted: unable to get local issuer") as caught:
                connect(url, api_key=key, ca=stranger and stranger.file, retry_for=0)
            assert "--ca" in caught.value.hint
        told = client(rest, "info", "--ca", second.file, "--api-key", key)
        assert told.returncode == 1
        assert "certificate" in told.stderr
        assert client(rest, "info", "--ca", first.file, "--api-key", key).returncode == 0

        files.key.write_text("half of a file")  # in the midst of being renewed
        until(lambda: "the certificate in use stays" in log.read_text())
        assert len(card_names(first)) == 2
        second.sign(files)
        until(lambda: log.read_text().count("was renewed") == 1)
        assert len(card_names(second)) == 2
        with pytest.raises(Untrusted):
            card_names(first)
        second.sign(files, "another.example.com")
        until(lambda: log.read_text().count("was renewed") == 2)
        for url in urls:
            with pytest.raises(Untrusted, match=r"(?i)peer name|hostname|not valid for"):
                connect(url, api_key=key, ca=second.file, retry_for=0)
        assert silent.recv(1) == b""


@pytest.mark.unguarded("clients show certificates of their own in place of keys")
def test_tenants_are_known_by_their_certificates(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Both transports demand one; a key that is shown besides must be the same tenant's."""
    owners, clients, strangers = (Authority(tmp_path, name) for name in ("owners", "clients", "strangers"))
    files = Certificate(tmp_path / "server.pem", tmp_path / "server.key")
    owners.sign(files)
    own = {}
    for name, authority in (("acme", clients), ("beta", clients), ("nobody", clients), ("false", strangers)):
        own[name] = Certificate(tmp_path / f"{name}-own.pem", tmp_path / f"{name}-own.key")
        authority.sign(own[name], f"{name}.example.com", common_name="acme" if name == "false" else name)
    store = TenantStore(f"sqlite:///{tmp_path}/owner.db")
    keys = {"acme": str(store.add("acme", ["card", "encode"])), "beta": str(store.add("beta"))}
    port = free_port()
    flags = ["--model", str(tiny_models["llama"]), "--store", f"sqlite:///{tmp_path}/owner.db"]
    flags += ["--tls-certificate", str(files.chain), "--tls-key", str(files.key), "--tls-client-ca", str(clients.file)]
    acme = (own["acme"].chain, own["acme"].key)

    def asked(url: str, name: str | None, call: Callable[[Connection], Any], key: str | None = None) -> Any:
        shown: dict[str, Any] = {}
        if name:
            shown = {"client_certificate": own[name].chain, "client_key": own[name].key}
        connection = open_connection(url, api_key=key, ca=owners.file, retry_for=0, **shown)
        try:
            return call(connection)
        finally:
            connection.close()

    def card(connection: Connection) -> str:
        return connection.model_card().name

    def head(connection: Connection) -> int:
        return len(connection.lm_head(HeadRequest(stop=1)).weight_N_D)

    def is_refused(url: str, name: str) -> bool:
        try:
            asked(url, name, card)
        except PemaError:
            return True
        return False

    log = tmp_path / "server.log"
    with server(log, *flags, grpc_port=port, ca=owners.file, own=acme, module=IMPATIENT) as rest:
        urls = [rest, f"grpcs://127.0.0.1:{port}"]
        for url in urls:
            for key in (None, keys["acme"]):
                assert asked(url, "acme", card, key) == "llama"
                with pytest.raises(Forbidden, match="needs the scope head"):
                    asked(url, "acme", head, key)
            assert asked(url, "beta", head) == 1
            for _ in range(2):  # asked about, and known
                with pytest.raises(Forbidden, match="not that of the tenant"):
                    asked(url, "acme", card, keys["beta"])
            with pytest.raises(Unauthenticated, match="got another one"):
                asked(url, "acme", card, keys["acme"][:-2])
            with pytest.raises(Unauthenticated, match="names no tenant") as caught:
                asked(url, "nobody", card)
            assert "common name" in caught.value.hint
            for stranger in (None, "false"):
                for key in (None, keys["acme"]):
                    with pytest.raises(ConnectionFailed) as refused:
                        asked(url, stranger, card, key)
                    assert "--client-certificate" in refused.value.hint
        told = client(rest, "info", "--ca", owners.file, "--retry-for", 0)
        assert told.returncode == 1
        assert "--client-certificate" in told.stderr
        shown = ["--client-certificate", own["acme"].chain, "--client-key", own["acme"].key]
        assert client(rest, "info", "--ca", owners.file, *shown).returncode == 0

        store.disable("acme")
        strangers.sign(own["false"], "beta.example.com", common_name="beta")
        clients.file.write_bytes(clients.file.read_bytes() + strangers.file.read_bytes())  # one more authority
        until(lambda: "was renewed" in log.read_text() and all(is_refused(url, "acme") for url in urls))
        for url in urls:
            with pytest.raises(Unauthenticated, match="names no tenant"):
                asked(url, "acme", card)
            assert asked(url, "false", card) == "llama"


def test_what_is_no_certificate_is_told(tmp_path: Path) -> None:
    files = Certificate(tmp_path / "server.pem", tmp_path / "server.key")
    with pytest.raises(PemaError, match="no certificate and its key"):
        files.context()
    authority = Authority(tmp_path, "authority")
    authority.sign(files)
    assert files.context().cert_store_stats()
    other = Certificate(files.chain, tmp_path / "other.key")
    authority.sign(Certificate(tmp_path / "other.pem", other.key))
    with pytest.raises(PemaError, match="no certificate and its key"):
        other.context()
    with pytest.raises(InvalidRequest, match="holds no certificate"):
        connect("https://127.0.0.1:1", ca=files.key)
    with pytest.raises(InvalidRequest, match="only one of them"):
        connect("https://127.0.0.1:1", client_key=files.key)
    with pytest.raises(InvalidRequest, match="no certificate and its key"):
        connect("https://127.0.0.1:1", client_certificate=files.chain, client_key=other.key)
    with pytest.raises(PemaError, match="holds no authorities"):
        Certificate(files.chain, files.key, files.key).context()
    (tmp_path / "empty.pem").touch()
    with pytest.raises(InvalidRequest, match="holds no certificate"):
        connect("grpcs://127.0.0.1:1", ca=tmp_path / "empty.pem")
    (tmp_path / "remark.pem").write_bytes("# für uns\n".encode() + authority.file.read_bytes())
    with pytest.raises(ConnectionFailed):
        connect("https://127.0.0.1:1", ca=tmp_path / "remark.pem", retry_for=0)


def test_keys_do_not_travel_in_the_clear(tmp_path: Path) -> None:
    def settings(**given: object) -> ServerSettings:
        return ServerSettings(_env_file=None, store=f"sqlite:///{tmp_path}/owner.db", **given)  # type: ignore[arg-type]

    TenantStore(settings().store).add("acme")
    authenticator_for(settings())
    for given in ({}, {"allow_anonymous": True}):
        with pytest.raises(PemaError, match="unencrypted") as caught:
            authenticator_for(settings(host="192.0.2.1", **given))
        assert "--tls-certificate" in caught.value.hint
    authenticator_for(settings(host="192.0.2.1", insecure=True))
    authenticator_for(settings(host="192.0.2.1", tls_certificate="server.pem", tls_key="server.key"))
    with pytest.raises(ValueError, match="go together"):
        settings(tls_key="server.key")
    with pytest.raises(ValueError, match="--tls-client-ca needs"):
        settings(tls_client_ca="clients.pem")
    tls = {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "clients.pem"}
    assert certificate_authenticator_for(settings(**tls)) is not None
