"""Hosts by which a server without keys may be called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plm_owner_server.admission.allowed_hosts import AllowedHosts, allowed_hosts_for, metrics_hosts_for
from protocol.errors import Misdirected
from tests import support

LOOPBACK = [
    *("localhost", "localhost:8000", "LocalHost", "localhost.", "api.localhost:1"),
    *("127.0.0.1", "127.0.0.1:8000", "127.8.9.10:65535", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:80"),
]
FOREIGN = [
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evillocalhost"),
    *("evil@localhost", "localhost@evil.example", "localhost/evil", "local host", "", ":8000", "[::1", "[::2]:8000"),
    *("10.0.0.7:8000", "0.0.0.0", "lоcalhost", "evil.example:99999999"),  # noqa: S104 - a Cyrillic o
]


@pytest.mark.parametrize("authority", LOOPBACK)
def test_loopback_is_allowed(authority: str) -> None:
    assert AllowedHosts().allows(authority)


@pytest.mark.parametrize("authority", FOREIGN)
def test_other_hosts_are_refused(authority: str) -> None:
    assert not AllowedHosts().allows(authority)
    with pytest.raises(Misdirected) as caught:
        AllowedHosts().check(authority)
    assert "--allowed-hosts" in caught.value.hint
    assert not authority or authority not in str(caught.value)  # which may be any text


@pytest.mark.parametrize(
    ("named", "authority", "allowed"),
    [
        (["gpu.example.com"], "GPU.example.com:8000", True),
        (["gpu.example.com"], "a.gpu.example.com", False),
        (["*.example.com"], "a.b.example.com:1", True),
        (["*.example.com"], "example.com", False),
        (["*.example.com"], "evilexample.com", False),
        (["*"], "evil.example", True),
        (["gpu.example.com:8000"], "gpu.example.com:9000", True),
        (["fd00::7"], "[fd00::7]:8000", True),
        (["[fd00::7]"], "[fd00::7]:8000", True),
        (["2001:DB8:0::1"], "[2001:db8::1]:8000", True),
    ],
)
def test_named_hosts_are_allowed(named: list[str], authority: str, allowed: bool) -> None:
    assert AllowedHosts(named).allows(authority) is allowed


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        (None, None, True),  # no browser
        ("localhost:8000", "http://localhost:8000", True),
        ("localhost:8000", "http://127.0.0.1:9999", True),
        ("localhost:8000", "https://evil.example", False),
        ("localhost:8000", "null", False),
        ("evil.example:8000", "http://evil.example:8000", False),
    ],
)
def test_web_pages_of_others_are_refused(host: str | None, origin: str | None, allowed: bool) -> None:
    if allowed:
        AllowedHosts().check(host, origin)
        return
    with pytest.raises(Misdirected):
        AllowedHosts().check(host, origin)


@pytest.mark.parametrize(
    ("settings", "authority", "allowed"),
    [
        ({}, "server:8000", False),
        ({}, "10.0.0.7:8000", False),
        ({"allowed_hosts": ("server",)}, "server:8000", True),
        # In a container: its address for probes, its name for other containers.
        ({"host": "0.0.0.0"}, "10.1.2.3:8000", True),  # noqa: S104
        ({"host": "0.0.0.0"}, "[fd00::7]:8000", True),  # noqa: S104
        ({"host": "0.0.0.0"}, "server:8000", True),  # noqa: S104
        ({"host": "0.0.0.0"}, "localhost:8000", True),  # noqa: S104
        ({"host": "0.0.0.0"}, "pema.default.svc.cluster.local:8000", True),  # noqa: S104
        ({"host": "0.0.0.0"}, "gpu.local", True),  # noqa: S104
        ({"host": "0.0.0.0"}, "evil.local.example", False),  # noqa: S104
        ({"host": "0.0.0.0"}, "evil.example:8000", False),  # noqa: S104
        ({"host": "::"}, "evil.example:8000", False),
        ({"host": "gpu.example.com"}, "gpu.example.com:8000", True),
        ({"host": "gpu.example.com"}, "evil.example", False),
        # A browser compares the name in the certificate.
        ({"tls_certificate": Path("a.pem"), "tls_key": Path("a.key")}, "plm.example.com", True),
    ],
)
def test_the_address_to_listen_on_decides(settings: dict[str, Any], authority: str, allowed: bool) -> None:
    assert allowed_hosts_for(support.make_settings(**settings)).allows(authority) is allowed


@pytest.mark.parametrize(
    ("settings", "authority", "allowed"),
    [
        ({}, "127.0.0.1:9100", True),
        ({}, "evil.example:9100", False),
        ({"metrics_host": "0.0.0.0"}, "172.18.0.3:9100", True),  # noqa: S104
        ({"metrics_host": "0.0.0.0"}, "evil.example", False),  # noqa: S104
        ({"tls_certificate": Path("a.pem"), "tls_key": Path("a.key")}, "evil.example", False),
    ],
)
def test_metrics_have_no_tls(settings: dict[str, Any], authority: str, allowed: bool) -> None:
    assert metrics_hosts_for(support.make_settings(**settings)).allows(authority) is allowed
