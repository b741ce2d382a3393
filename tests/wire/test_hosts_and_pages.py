"""Hosts and browsers: rebound names are refused, HEAD is answered, the OpenAPI page needs no other server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from plm_owner_server.admission.allowed_hosts import AllowedHosts
from plm_owner_server.admission.authentication import TenantKeyAuthenticator
from plm_owner_server.operations.metrics import Metrics
from plm_owner_server.operations.serving_state import ServingState
from plm_owner_server.service.plm_service import PlmService
from plm_owner_server.tenants.store import TenantStore
from protocol.errors import Misdirected, from_problem
from tests import guard
from tests.support import empty_database, serve
from tests.wire.test_service import checked_problem

PATHS = ["/healthz", "/readyz", "/docs", "/openapi.json", "/v1/model", "/v1/tokenizer", "/v1/lm-head", "/nowhere"]
open_server = pytest.mark.unguarded("a server without keys")


@pytest.fixture(scope="module")
def http(tiny_server: str) -> Iterator[httpx.Client]:
    with guard.http(tiny_server) as client:
        yield client


@open_server
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_a_rebound_name_is_refused(path: str, headers: dict[str, str], http: httpx.Client) -> None:
    response = http.get(path, headers=headers)
    assert response.status_code == 421
    error = checked_problem(response)
    assert type(error) is Misdirected
    assert "--allowed-hosts" in error.hint
    assert "evil" not in response.text


@open_server
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:8000", "127.1.2.3"])
def test_loopback_is_answered_by_any_name(host: str, http: httpx.Client) -> None:
    assert http.get("/v1/model", headers={"Host": host}).status_code == 200


def test_with_keys_any_host_is_answered(tiny_service: PlmService, tmp_path: Path) -> None:
    access = TenantKeyAuthenticator(TenantStore(empty_database(tmp_path)))
    with serve(tiny_service, access=access) as url, guard.http(url) as client:
        headers = {"Host": "plm.example.com", "Authorization": "Bearer no-key"}
        assert client.get("/v1/model", headers=headers).status_code == 401
        assert client.get("/healthz", headers=headers).status_code == 200


@open_server
def test_metrics_are_for_loopback_names(tiny_service: PlmService) -> None:
    metrics = Metrics(ServingState(tiny_service))
    with metrics.served("127.0.0.1", 0, check_host=AllowedHosts().check) as port:
        url = f"http://127.0.0.1:{port}/metrics"
        refused = httpx.get(url, headers={"Host": "evil.example"}, trust_env=False)
        assert refused.status_code == 421
        assert type(from_problem(refused.json(), 421)) is Misdirected
        answered = httpx.get(url, headers={"Host": f"localhost:{port}"}, trust_env=False)
        assert "pema_ready 1" in answered.text
        head = httpx.head(url, trust_env=False)
        assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_the_body(path: str, http: httpx.Client) -> None:
    got, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    for name in ("content-type", "content-length", "etag"):
        assert head.headers.get(name) == got.headers.get(name)
    assert (got.status_code == 404) == (path == "/nowhere")
    assert http.get("/healthz").json() == {"status": "alive"}  # the connection is still good


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_slash_behind_a_probe_does_not_count(path: str, http: httpx.Client) -> None:
    got, slashed = http.get(path), http.get(f"{path}/")
    assert (slashed.status_code, slashed.content) == (got.status_code, got.content)


def test_head_says_when_the_server_is_not_ready() -> None:
    with serve(None) as url, guard.http(url) as client:
        assert client.head("/healthz").status_code == 200
        assert client.head("/readyz").status_code == 503


class Links(HTMLParser):
    """Collects what a page loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_openapi_page_needs_no_other_server(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    links = Links(page.text).found
    assert {name.rpartition(".")[2] for name in links} >= {"js", "css"}
    for link in links:
        assert not urlsplit(link).netloc, link
        assert http.get(urljoin("/docs", link)).status_code == 200
    foreign = set(re.findall(r"https?://[^\s'\"]+", page.text))
    assert not foreign
    (script,) = (link for link in links if link.endswith(".js"))
    assert "SwaggerUIBundle" in http.get(script).text
    assert '"validatorUrl": null' in page.text  # its default is a server of others
    (style,) = (link for link in links if link.endswith(".css"))
    assert not re.findall(r"(?:@import|url\()\s*['\"]?https?:", http.get(style).text)
    assert http.get("/redoc").status_code == 404
