"""Addresses of servers, and the proxies that the environment has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_owner_client.plm.connection.network.address import ServerAddress
from data_owner_client.plm.connection.network.proxies import proxy_for
from data_owner_client.plm.connection.open import open_connection
from data_owner_client.plm.connection.settings import ConnectionSettings
from protocol.addresses import is_loopback
from protocol.errors import InvalidRequest


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://plm.example.com", "https://plm.example.com"),
        ("HTTPS://PLM.example.COM:443/", "https://plm.example.com"),
        (" http://127.0.0.1:8000\n", "http://127.0.0.1:8000"),
        ("https://host.example/pema/", "https://host.example/pema"),
        ("grpcs://plm.example.com", "grpcs://plm.example.com"),
        ("grpc://[::1]:8001/", "grpc://[::1]:8001"),
        ("http://[2001:DB8::1]:80", "http://[2001:db8::1]"),
        ("grpcs://müller.example:1", "grpcs://xn--mller-kva.example:1"),
    ],
)
def test_addresses_are_read(url: str, address: str) -> None:
    assert ServerAddress.parse(url).url == address


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("plm.example.com:8000", "is not the address"),
        ("127.0.0.1:8000", "is not the address"),
        ("ftp://plm.example.com", "is not the address"),
        ("http://", "is not the address"),
        ("http://[::1", "is not the address"),
        ("http://plm example.com", "is not the address"),
        ("http://plm.exam\nple.com", "is not the address"),
        ("http://plm.example.com:port", "is not the address"),
        ("http://plm.example.com:99999", "no usable port"),
        ("grpc://plm.example.com", "no usable port"),
        ("grpcs://plm.example.com/pema", "gRPC cannot take"),
        ("https://plm.example.com/?x=1", "after [?] or #"),
        ("https://plm.example.com/#there", "after [?] or #"),
        ("https://me:secret-word@plm.example.com", "user name or password"),
        ("http://127.0.0.1@plm.example.com", "user name or password"),
    ],
)
def test_what_is_no_address_is_said(url: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        open_connection(url)
    assert "secret-word" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST", "localhost.", "plm.localhost", "[::1]", "[::]"]
)
def test_this_machine_takes_no_proxy(monkeypatch: pytest.MonkeyPatch, scheme: str, host: str) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://proxy.example.com:3128")
    assert proxy_for(ServerAddress.parse(f"{scheme}://{host}:8000")) is None


@pytest.mark.parametrize(
    ("scheme", "variable"),
    [
        ("http", "http_proxy"),
        ("grpc", "http_proxy"),
        ("grpc", "HTTP_PROXY"),
        ("grpc", "grpc_proxy"),
        ("https", "HTTPS_PROXY"),
        ("grpcs", "https_proxy"),
        ("grpcs", "HTTPS_PROXY"),
        ("grpcs", "grpc_proxy"),
        *((scheme, name) for scheme in ("http", "https", "grpc", "grpcs") for name in ("all_proxy", "ALL_PROXY")),
    ],
)
@pytest.mark.parametrize("value", ["http://me:word@proxy.example.com:3128", "me:word@proxy.example.com:3128\n"])
def test_variables_name_proxies(monkeypatch: pytest.MonkeyPatch, scheme: str, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    proxy = proxy_for(ServerAddress.parse(f"{scheme}://plm.example.com:8000"))
    assert proxy is not None
    assert proxy.url == "http://me:word@proxy.example.com:3128"
    assert str(proxy) == f"proxy http://proxy.example.com:3128 of {variable}"
    assert "word" not in repr(proxy)


@pytest.mark.parametrize(
    ("scheme", "variable"), [("http", "https_proxy"), ("grpcs", "http_proxy"), ("http", "grpc_proxy")]
)
def test_variables_of_other_schemes_do_not_count(monkeypatch: pytest.MonkeyPatch, scheme: str, variable: str) -> None:
    monkeypatch.setenv(variable, "http://proxy.example.com:3128")
    assert proxy_for(ServerAddress.parse(f"{scheme}://plm.example.com:8000")) is None


NO_PROXY_CASES = [
    ("*", True),
    ("example.com", True),
    (".example.com", True),
    ("*.example.com", True),
    ("EXAMPLE.com", True),
    ("plm.example.com", True),
    ("plm.example.com:8443", True),
    ("https://plm.example.com", True),
    ("intern, plm.example.com ,10.0.0.0/8", True),
    ("intern plm.example.com", True),
    ("other.example.org;plm.example.com", True),
    ("https://plm.example.com/", True),
    ("plm*.example.com", True),
    ("p*.example.org", False),
    ("", False),
    ("plm.example.com:8444", False),
    ("ample.com", False),
    ("other.example.com", False),
    ("plm.example.com.example.org", False),
    ("10.0.0.0/8", False),
]


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize(("value", "exempt"), NO_PROXY_CASES)
def test_exceptions_count_on_both_transports(
    monkeypatch: pytest.MonkeyPatch, scheme: str, variable: str, value: str, exempt: bool
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example.com:3128")
    monkeypatch.setenv(variable, value)
    assert (proxy_for(ServerAddress.parse(f"{scheme}://plm.example.com:8443")) is None) == exempt


def test_exceptions_of_grpc_go_before_those_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example.com:3128")
    monkeypatch.setenv("no_proxy", "a.example")
    monkeypatch.setenv("no_grpc_proxy", "b.example")
    exempt = {
        (scheme, host): proxy_for(ServerAddress.parse(f"{scheme}://{host}:8443")) is None
        for scheme in ("https", "grpcs")
        for host in ("a.example", "b.example")
    }
    assert [key for key, value in exempt.items() if value] == [("https", "a.example"), ("grpcs", "b.example")]


@pytest.mark.parametrize(
    ("host", "value", "exempt"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3:8443", True),
        ("10.1.2.3", "10.1.2.3:1", False),
        ("10.1.2.3", "10.1.*", True),
        ("10.1.2.3", "10.2.*", False),
        ("10.1.2.3", "*", True),
        ("10.1.2.3", "2.3", False),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("[2001:db8::1]", "2001:db8::/32", True),
        ("[2001:db8::1]", "[2001:db8::1]:8443", True),
        ("[2001:db8::1]", "2001:db8::2", False),
    ],
)
def test_exceptions_may_be_networks(monkeypatch: pytest.MonkeyPatch, host: str, value: str, exempt: bool) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example.com:3128")
    monkeypatch.setenv("NO_PROXY", value)
    assert (proxy_for(ServerAddress.parse(f"https://{host}:8443")) is None) == exempt


@pytest.mark.parametrize(
    "value", ["http://", "http://[::1", "http://secret-word:x", "socks4://secret-word:1", "ftp://h", "http://h:0x1"]
)
@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_what_is_no_proxy_is_said_by_its_variable(monkeypatch: pytest.MonkeyPatch, scheme: str, value: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(InvalidRequest, match="HTTPS_PROXY does not hold the address of a proxy") as caught:
        open_connection(f"{scheme}://plm.example.com:1")
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize("value", ["socks://h:1080", "socks5://h", "socks5h://h", "https://h"])
def test_grpc_says_which_proxies_it_cannot_take(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    with pytest.raises(InvalidRequest, match=r"gRPC cannot go through the proxy .* of ALL_PROXY") as caught:
        open_connection("grpcs://plm.example.com:8001")
    assert "NO_PROXY=plm.example.com" in caught.value.hint
    monkeypatch.setenv("NO_PROXY", "plm.example.com")
    open_connection("grpcs://plm.example.com:8001").close()


@given(st.text(max_size=60), st.sampled_from(["", "http://", "grpc://", "https://h", "grpcs://h:1"]))
def test_no_text_is_taken_for_an_address_by_mistake(text: str, before: str) -> None:
    try:
        address = ServerAddress.parse(before + text)
    except InvalidRequest:
        return
    assert ServerAddress.parse(address.url) == address


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("a.localhost", True),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("::", False),  # to listen there is to be reached by everybody
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@pytest.mark.parametrize("key", [" secret-key", "secret-key\n", "\tsecret-key \r\n"])
def test_space_around_a_key_is_left_out(key: str) -> None:
    assert ConnectionSettings(api_key=key).api_key == "secret-key"


@pytest.mark.parametrize("name", ["ca", "client_certificate", "client_key"])
def test_space_around_a_file_is_left_out_and_nothing_is_none(name: str) -> None:
    def read(value: str | None) -> Path | None:
        fields: dict[str, Any] = {name: None if value is None else Path(value)}
        file: Path | None = getattr(ConnectionSettings(**fields), name)
        return file

    assert read("my folder/file.pem\n") == read(" my folder/file.pem") == Path("my folder/file.pem")
    assert read("") is read("\n") is read(None) is None
    assert ConnectionSettings(api_key=" \n").api_key is None


@pytest.mark.parametrize(
    "key", ["schlüssel", "two\nlines", "two words", "Bearer secret-word", "a\0b", "a\u200bb", '"key"', "'key'"]
)
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="PEMA_API_KEY or --api-key") as caught:
        ConnectionSettings(api_key=key)
    assert key not in str(caught.value)
    assert "secret-word" not in str(caught.value)
