"""The gateway's application: who may call it, its routes that need no rounds, its page and its metrics."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from data_owner_client.gateway.app import create_app
from data_owner_client.gateway.metrics import Metrics
from data_owner_client.gateway.owner_state import OwnerProbe
from data_owner_client.gateway.routes.page import page_files
from data_owner_client.gateway.scoring import EchoScorer
from data_owner_client.gateway.security import AllowedHosts
from data_owner_client.gateway.served_models import ServedModels
from data_owner_client.gateway.server_process import listening
from data_owner_client.gateway.settings import GatewaySettings
from data_owner_client.gateway.state import Gateway
from data_owner_client.gateway.workers import Workers
from data_owner_client.plm.connection.in_process import InProcessConnection
from data_owner_client.plm.remote_plm import RemotePlm
from harness.tiny_models import TinyModels
from protocol.errors import ConnectionFailed, Forbidden, InvalidRequest, Overloaded, PemaError
from tests import support

BASE = "http://127.0.0.1:8010"
SECRET_TEXT = "patient 4711 has a secret"
KEY = "k" * 32


@pytest.fixture(scope="module")
def plm(tiny_models: TinyModels) -> RemotePlm:
    return RemotePlm(InProcessConnection(support.make_service(tiny_models["llama"])), cache=None)


@pytest.fixture
def client_with(plm: RemotePlm) -> Callable[..., TestClient]:
    """Makes clients of gateways with these settings."""

    def make(**settings: Any) -> TestClient:
        models = ServedModels(plm, {}, check_seconds=None)
        metrics = Metrics(lambda: [model.name for model in models.all()])
        rounds: Any = SimpleNamespace(waiting=3, active=2)
        metrics.watch(waiting=lambda: rounds.waiting, active=lambda: rounds.active)
        owner = OwnerProbe(lambda: plm.card, plm.card.digest)
        chosen = GatewaySettings(**settings)
        gateway = Gateway(plm, models, rounds, chosen, metrics, owner, EchoScorer(plm), Workers(chosen.max_waiting))
        app = create_app(gateway)

        @app.post("/fails")
        async def fails(request: Request) -> None:
            raise RuntimeError(SECRET_TEXT)

        return TestClient(app, base_url=BASE)

    return make


def error_of(response: Any) -> dict[str, Any]:
    """The error of an answer, whose form is OpenAI's."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8010", 200),
        ("localhost:8010", 200),
        ("LOCALHOST:8010", 200),
        ("[::1]:8010", 200),
        ("gateway:8010", 200),
        ("gateway.example", 200),  # port 443, which browsers leave out
        ("evil.example:8010", 421),
        ("127.0.0.1.evil.example:8010", 421),
        ("localhost:8000", 421),
        ("localhost", 421),
        ("gateway:80", 421),
        ("10.0.0.7:8010", 421),
        ("a@127.0.0.1:8010", 421),
        ("127.0.0.1:80x", 421),
        ("", 421),
    ],
)
def test_only_own_names_are_answered(host: str, status: int, client_with: Callable[..., TestClient]) -> None:
    """As after DNS rebinding, where a page's own name leads to this machine."""
    client = client_with(allowed_hosts=("gateway", "gateway.example:443"))
    response = client.get("/v1/models", headers={"Host": host})
    assert response.status_code == status
    if status != 200:
        assert error_of(response)["code"] == "misdirected"


def test_a_gateway_for_others_is_called_by_any_address() -> None:
    hosts = AllowedHosts(GatewaySettings(host="0.0.0.0", gateway_key=KEY))  # noqa: S104
    assert hosts.allows("10.0.0.7:8010")
    assert hosts.allows("[fd00::7]:8010")
    assert hosts.allows("localhost:8010")
    assert not hosts.allows("evil.example:8010")
    assert not hosts.allows("10.0.0.7:8000")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (BASE, 200),
        ("http://127.0.0.1:3000", 403),
        ("http://localhost:8010", 403),  # another name, hence another origin
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_pages_of_others_are_refused(origin: str, status: int, client_with: Callable[..., TestClient]) -> None:
    response = client_with().post("/tokenize", json={"prompt": "a"}, headers={"Origin": origin})
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_there_is_no_cors_by_default(client_with: Callable[..., TestClient]) -> None:
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    response = client_with().options("/v1/models", headers=headers)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


def test_named_pages_may_call(client_with: Callable[..., TestClient]) -> None:
    client, origin = client_with(allow_origin=("https://app.example",), gateway_key=KEY), "https://app.example"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = client.options("/tokenize", headers={"Origin": origin, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    authorised = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
    response = client.post("/tokenize", json={"prompt": "a"}, headers=authorised)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, origin)
    assert client.options("/tokenize", headers={"Origin": "https://b.example", **asked}).status_code == 403


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_posts_must_be_json(content_type: str | None, client_with: Callable[..., TestClient]) -> None:
    """Pages of others can send these without asking first."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = client_with().post("/tokenize", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


def test_json_may_name_its_characters(client_with: Callable[..., TestClient]) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert client_with().post("/tokenize", content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize("value", [None, "", KEY, "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \u00e9"])
def test_a_key_is_demanded(value: str | None, client_with: Callable[..., TestClient]) -> None:
    client = client_with(gateway_key=KEY)
    headers = {} if value is None else {b"Authorization": value.encode()}
    for path in ("/v1/models", "/metrics", "/tokenizer_info", "/openapi.json"):
        response = client.get(path, headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), path
        assert error_of(response)["code"] == "invalid_api_key"
    assert client.post("/tokenize", json={"prompt": "a"}, headers=headers).status_code == 401
    assert client.post("/health", json={}, headers=headers).status_code == 401
    assert client.get("/health", headers=headers).json() == {"status": "ok"}
    assert client.get("/", headers=headers).status_code == 200


def test_the_right_key_opens(client_with: Callable[..., TestClient]) -> None:
    client = client_with(gateway_key=f"{KEY}\n")
    for scheme in ("Bearer", "bearer"):
        assert client.get("/v1/models", headers={"Authorization": f"{scheme} {KEY}"}).status_code == 200


def test_any_key_is_taken_where_none_is_set(client_with: Callable[..., TestClient]) -> None:
    assert client_with().get("/v1/models", headers={"Authorization": "Bearer anything"}).status_code == 200


@pytest.mark.parametrize("is_declared", [True, False])
def test_bodies_are_bounded_while_they_arrive(is_declared: bool, client_with: Callable[..., TestClient]) -> None:
    client = client_with(max_body_bytes=4096)
    pieces = (b" " * 1024 for _ in range(1000))
    content = b" " * 1_024_000 if is_declared else pieces
    response = client.post("/tokenize", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "payload_too_large"
    assert client.post("/tokenize", json={"prompt": "a" * 4000}).status_code == 200


@pytest.mark.parametrize("path", page_files())
def test_the_page_is_confined(path: str, client_with: Callable[..., TestClient]) -> None:
    response = client_with().get(path)
    assert response.status_code == 200
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert response.headers["x-content-type-options"] == "nosniff"
    if response.headers["content-type"].startswith("text/html"):
        assert not re.search(
            r"<script(?![^>]* src=)|\son\w+=|\sstyle=|//", response.text.replace("http://www.w3.org", "")
        )


def test_only_files_of_the_page_are_served(client_with: Callable[..., TestClient]) -> None:
    client = client_with()
    for path in ("/../settings.py", "/%2e%2e/settings.py", "/routes/page.py", "/nothing", "/docs", "/v1/responses"):
        response = client.get(path)
        assert response.status_code == 404, path
        error_of(response)


def test_models_are_listed_with_and_without_version(client_with: Callable[..., TestClient], plm: RemotePlm) -> None:
    client, name = client_with(), plm.card.name
    for prefix in ("/v1", ""):
        listed = client.get(f"{prefix}/models").json()
        assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", [name])
        one = client.get(f"{prefix}/models/{name}").json()
        assert (one["object"], one["parent"]) == ("model", None)
        assert one in listed["data"]


def test_an_unknown_model_is_not_found(client_with: Callable[..., TestClient]) -> None:
    client = client_with()
    for response in (client.get("/v1/models/none"), client.post("/tokenize", json={"prompt": "a", "model": "none"})):
        assert response.status_code == 404
        assert error_of(response)["message"].startswith("There is no model of this name.")


@pytest.mark.parametrize("text", ["Hello, world", "", "two  spaces\n\nand lines", "<s>a</s>b<s>", "déjà vu 🙂"])
def test_tokens_of_a_text_lead_back_to_it(text: str, client_with: Callable[..., TestClient], plm: RemotePlm) -> None:
    client = client_with()
    answer = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"])
    specials = [i for spelling, i in plm.tokenizer.special_ids.items() for _ in range(text.count(spelling))]
    assert sorted(i for i in answer["tokens"] if i in plm.tokenizer.special_ids.values()) == sorted(specials)
    back = client.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
    assert back == (plm.tokenizer.change(text) or text)


def test_the_end_token_is_one_token(client_with: Callable[..., TestClient], plm: RemotePlm) -> None:
    """As lm-evaluation-harness finds its id."""
    client = client_with()
    info = client.get("/tokenizer_info").json()
    answer = client.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()
    assert answer["tokens"] == [plm.tokenizer.special_ids[info["eos_token"]]]
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"] == info["eos_token"]
    assert info["chat_template"] == plm.tokenizer.chat_templates["default"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": 7}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
    ],
)
def test_mistakes_are_named(path: str, body: dict[str, Any], client_with: Callable[..., TestClient]) -> None:
    content, headers = json.dumps(body), {"Content-Type": "application/json"}
    response = client_with().post(path, content=content, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["param"].startswith("prompt" if path == "/tokenize" else "tokens")


def test_unknown_fields_are_ignored(client_with: Callable[..., TestClient]) -> None:
    assert client_with().post("/tokenize", json={"prompt": "a", "mirostat": 2}).status_code == 200


def test_health_tells_of_the_owner(client_with: Callable[..., TestClient], plm: RemotePlm) -> None:
    health, models = client_with().get("/health").json(), {plm.card.name: plm.card.digest[:16]}
    assert health == {"status": "ok", "owner": "ok", "models": models, "problems": {}, "waiting": 3, "active": 2}
    assert client_with().head("/health").status_code == 200


@pytest.mark.parametrize(
    ("error", "state"),
    [(ConnectionFailed("no"), "away"), (Overloaded("no"), "busy"), (Forbidden("no"), "refuses")],
)
def test_the_owner_is_asked_once_in_a_while(error: PemaError, state: str) -> None:
    calls = list[None]()

    def ask() -> Any:
        calls.append(None)
        raise error

    probe = OwnerProbe(ask, "digest")
    assert (probe.state(), probe.state(), len(calls)) == (state, state, 1)


def test_another_model_of_the_owner_is_seen(plm: RemotePlm) -> None:
    assert OwnerProbe(lambda: plm.card, "another").state() == "other_model"


def test_metrics_and_log_hold_no_text(client_with: Callable[..., TestClient], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="data_owner_client")
    client = client_with()
    client.post("/tokenize", json={"prompt": SECRET_TEXT})
    client.post("/tokenize", json={"prompt": [SECRET_TEXT]})
    client.get(f"/{SECRET_TEXT}", headers={"Authorization": f"Bearer {SECRET_TEXT}"})
    client.get("/v1/models", params={"q": SECRET_TEXT})
    client.request(SECRET_TEXT.split()[0], "/v1/models")
    failed = client.post("/fails", json={"prompt": SECRET_TEXT})
    assert (failed.status_code, error_of(failed)["code"]) == (500, "server_error")
    exposed = client.get("/metrics").text
    for text in (exposed, caplog.text, failed.text):
        assert "4711" not in text
        assert "patient" not in text.lower()
    assert "RuntimeError" in caplog.text


def test_metrics_count_by_route_and_status(client_with: Callable[..., TestClient], plm: RemotePlm) -> None:
    client = client_with()
    for _ in range(3):
        client.get(f"/v1/models/{plm.card.name}")
    client.get("/nothing")
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    assert values["pema_gateway_requests_total", "/models/{name:path}", "200"] == 3
    assert values["pema_gateway_requests_total", "other", "404"] == 1
    assert values["pema_gateway_waiting_answers",] == 3
    assert values["pema_gateway_active_answers",] == 2


def test_models_of_metrics_are_configured_ones() -> None:
    metrics = Metrics(lambda: ["formal"])
    metrics.count_tokens("formal", prompt=5, completion=2)
    metrics.count_tokens(SECRET_TEXT, prompt=7, completion=1)
    metrics.observe_first_token(SECRET_TEXT, 0.1)
    exposed = metrics.exposition().decode()
    assert 'pema_gateway_tokens_total{kind="prompt",model="formal"} 5.0' in exposed
    assert 'pema_gateway_tokens_total{kind="prompt",model="other"} 7.0' in exposed
    assert "4711" not in exposed


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0"},  # noqa: S104
        {"host": "192.168.1.5", "gateway_key": "  "},
        {"gateway_key": "a b"},
        {"gateway_key": "schlüssel"},
        {"allow_origin": ("*",)},
        {"allow_origin": ("app.example",)},
        {"allowed_hosts": ("*",)},
        {"port": 70_000},
        {"batch_size": 0},
        {"log_level": "loud"},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GatewaySettings(**settings)
    assert caught.value.hint
    assert "schl" not in str(caught.value)


def test_the_key_is_not_in_the_settings_text() -> None:
    assert KEY not in repr(GatewaySettings(gateway_key=KEY))


def test_a_port_in_use_is_told_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(PemaError, match=f"port {port} of 127.0.0.1: address already in use"),
            listening("127.0.0.1", port),
        ):
            pass
