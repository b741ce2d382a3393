"""Proxies and trusted roots of the environment: the same on both transports, and named when they fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from data_owner_client.plm.connection.base import Connection
from data_owner_client.plm.connection.open import open_connection
from harness.proxies import http_proxy, socks_proxy
from plm_owner_server.admission.allowed_hosts import ANY_HOST
from plm_owner_server.admission.authentication import NoAuthentication
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.transports.tls import Certificate
from protocol import errors
from protocol.messages import EncodeRequest
from tests import guard
from tests.support import serve, serve_over_grpc

pytestmark = pytest.mark.unguarded("servers without tenants, and with certificates of their own")

HOST = "plm.example.com"
REQUEST = EncodeRequest(token_ids=[[5, 6, 7]], from_position=[0])
VARIABLES = ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"]
BOTH = pytest.mark.parametrize("scheme", ["http", "grpc"])
BOTH_ENCRYPTED = pytest.mark.parametrize("scheme", ["https", "grpcs"])


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port(scheme: str, tiny_service: PlmService) -> Iterator[int]:
    """Port of an unencrypted server of the transport, which answers to every host name."""
    with (serve if scheme == "http" else serve_over_grpc)(tiny_service, hosts=ANY_HOST) as url:
        yield urlsplit(url).port or 0


@pytest.fixture
def authority(tmp_path: Path) -> guard.Authority:
    return guard.Authority(tmp_path, "authority")


@pytest.fixture
def encrypted_port(
    scheme: str, tmp_path: Path, authority: guard.Authority, tiny_service: PlmService, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Port of a server whose certificate is for `HOST`, from the authority."""
    certificate = Certificate(tmp_path / "server.pem", tmp_path / "server.key")
    authority.sign(certificate, HOST)
    with monkeypatch.context() as patched:
        patched.setattr(guard, "current", guard.Guard(certificate, authority.file, "", ""))
        server = serve if scheme == "https" else serve_over_grpc
        with server(tiny_service, access=NoAuthentication(), hosts=ANY_HOST) as url:
            patched.undo()
            yield urlsplit(url).port or 0


def connect(url: str, **settings: Any) -> closing[Connection]:
    return closing(open_connection(url, **({"retry_for": 0, "timeout": 20} | settings)))


def name_of(url: str, **settings: Any) -> str:
    with connect(url, **settings) as connection:
        connection.encode(REQUEST)
        return connection.model_card().name


@BOTH
@pytest.mark.parametrize(
    "variable", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "all_proxy", "grpc_proxy"]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_calls_to_this_machine_take_no_proxy(
    monkeypatch: pytest.MonkeyPatch, scheme: str, port: int, variable: str, host: str
) -> None:
    with http_proxy(port) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        assert name_of(f"{scheme}://{host}:{port}", api_key="secret-key") == "llama"
    assert proxy.seen == []


@BOTH
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_calls_to_other_machines_take_the_proxy(
    monkeypatch: pytest.MonkeyPatch, scheme: str, port: int, variable: str
) -> None:
    with http_proxy(port) as proxy:
        monkeypatch.setenv(variable, f"http://me:word@127.0.0.1:{proxy.port}")
        assert name_of(f"{scheme}://{HOST}:8000") == "llama"
    assert all(HOST in head and "proxy-authorization: basic bwu6d29yza==" in head.lower() for head in proxy.seen)
    assert proxy.seen


@BOTH
@pytest.mark.parametrize("value", [HOST, ".example.com", "*", f"{HOST}:8000"])
def test_exceptions_are_reached_without_the_proxy(
    monkeypatch: pytest.MonkeyPatch, scheme: str, port: int, value: str
) -> None:
    with http_proxy(port) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", value)
        with pytest.raises(errors.ConnectionFailed, match="The name is not known"):
            name_of(f"{scheme}://{HOST}:8000")
        assert proxy.seen == []
        monkeypatch.setenv("NO_PROXY", "ample.com")  # not an end of the name at a dot
        assert name_of(f"{scheme}://{HOST}:8000") == "llama"


@BOTH
def test_a_key_does_not_go_through_a_proxy_in_the_clear(
    monkeypatch: pytest.MonkeyPatch, scheme: str, port: int
) -> None:
    with http_proxy(port) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(errors.InvalidRequest, match="in the clear"):
            connect(f"{scheme}://{HOST}:8000", api_key="secret-key")
        assert proxy.seen == []
        assert name_of(f"{scheme}://{HOST}:8000", api_key="secret-key", insecure=True) == "llama"


@BOTH_ENCRYPTED
def test_a_key_goes_through_a_proxy_encrypted(
    monkeypatch: pytest.MonkeyPatch, scheme: str, encrypted_port: int, authority: guard.Authority
) -> None:
    with http_proxy(encrypted_port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert name_of(f"{scheme}://{HOST}:8000", ca=authority.file, api_key="secret-key") == "llama"
    assert all(head.startswith(f"CONNECT {HOST}:8000 ") and "secret-key" not in head for head in proxy.seen)


@BOTH_ENCRYPTED
@pytest.mark.parametrize("variable", VARIABLES)
def test_roots_of_the_environment_are_trusted(
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    encrypted_port: int,
    authority: guard.Authority,
    tmp_path: Path,
    variable: str,
) -> None:
    folder = tmp_path / "roots"
    folder.mkdir()
    (folder / "ours.crt").write_bytes("# für uns\n".encode() + authority.file.read_bytes())
    (folder / "notes.txt").write_text("no certificate")
    stranger = guard.Authority(tmp_path, "stranger").file
    with http_proxy(encrypted_port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(errors.Untrusted, match="Trusted: the system's certificates"):
            name_of(f"{scheme}://{HOST}:8000")
        monkeypatch.setenv(variable, f"{folder if variable.endswith('DIR') else folder / 'ours.crt'}\n")
        assert name_of(f"{scheme}://{HOST}:8000") == "llama"
        with pytest.raises(errors.Untrusted, match="Trusted: --ca"):  # which goes before the environment
            name_of(f"{scheme}://{HOST}:8000", ca=stranger)
        monkeypatch.setenv(variable, str(stranger))
        with pytest.raises(errors.Untrusted, match=f"Trusted: {variable}="):
            name_of(f"{scheme}://{HOST}:8000")


@BOTH_ENCRYPTED
def test_roots_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, scheme: str, tmp_path: Path) -> None:
    for value in (tmp_path / "missing.pem", tmp_path, Path(__file__)):
        monkeypatch.setenv("SSL_CERT_FILE", str(value))
        with pytest.raises(errors.InvalidRequest, match=r"SSL_CERT_FILE=.* holds no certificate"):
            connect(f"{scheme}://{HOST}:8000")
    with connect("http://127.0.0.1:1"):
        pass  # needs none


@pytest.mark.parametrize("scheme", ["http"])
@pytest.mark.parametrize("kind", ["socks", "socks5", "socks5h"])
def test_rest_goes_through_socks(monkeypatch: pytest.MonkeyPatch, port: int, kind: str) -> None:
    with socks_proxy(port) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"{kind}://127.0.0.1:{proxy.port}")
        assert name_of(f"http://{HOST}:8000") == "llama"
    assert set(proxy.seen) == {HOST}


@pytest.mark.parametrize("value", ["socks://127.0.0.1:1080", "socks5://127.0.0.1:1080"])
def test_a_missing_package_for_socks_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(errors.InvalidRequest, match="of ALL_PROXY needs a package") as caught:
        connect(f"https://{HOST}")
    assert "httpx[socks]" in caught.value.hint
    assert f"NO_PROXY={HOST}" in caught.value.hint


@pytest.mark.parametrize(
    ("scheme", "status", "kind", "words"),
    [
        ("http", 407, errors.InvalidRequest, "user name and password"),
        # Over plain HTTP, all other answers may come from the server.
        *(
            (scheme, *refusal)
            for scheme in ("https", "grpc", "grpcs")
            for refusal in (
                (407, errors.InvalidRequest, "user name and password"),
                (403, errors.InvalidRequest, "NO_PROXY="),
                (502, errors.GatewayFailed, "NO_PROXY="),
                (504, errors.GatewayTimeout, "NO_PROXY="),
            )
        ),
    ],
)
def test_a_proxy_that_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, status: int, kind: type[errors.PemaError], words: str
) -> None:
    with http_proxy(0, refusal=b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"http://me:secret-word@127.0.0.1:{proxy.port}")
        words_of_all = f"proxy http://127.0.0.1:{proxy.port} of ALL_PROXY answers HTTP {status}"
        with (
            connect(f"{scheme}://{HOST}:8000") as connection,
            pytest.raises(kind, match=words_of_all) as caught,
        ):
            connection.encode(REQUEST)
    assert words in caught.value.hint
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(("status", "kind"), [(403, errors.Forbidden), (502, errors.GatewayFailed)])
def test_a_proxy_may_have_answered_in_the_servers_place(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: type[errors.PemaError]
) -> None:
    with http_proxy(0, refusal=b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        with (
            connect(f"http://{HOST}:8000") as connection,
            pytest.raises(kind, match=r"may be the proxy .* of HTTP_PROXY"),
        ):
            connection.encode(REQUEST)


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
@pytest.mark.parametrize("hangs", [True, False])
def test_a_proxy_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, hangs: bool) -> None:
    with http_proxy(0, refusal=b"") as proxy:
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port if hangs else 1}")
        with (
            connect(f"{scheme}://{HOST}:8000", timeout=0.5) as connection,
            pytest.raises(errors.ConnectionFailed, match=r"the proxy http://127.0.0.1:\d+ of ALL_PROXY") as caught,
        ):
            connection.model_card()
    assert ("No answer came in time" if hangs else "nothing listens") in caught.value.detail
    assert f"NO_PROXY={HOST}" in caught.value.hint
