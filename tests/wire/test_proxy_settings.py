"""The environment's proxies, which a server on this machine is reached without."""

import pytest

from data_owner_client.plm.connection.open import open_connection

pytestmark = pytest.mark.unguarded("a server without tenants")


def test_what_goes_to_this_machine_takes_no_proxy(monkeypatch: pytest.MonkeyPatch, tiny_server: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    connection = open_connection(tiny_server, api_key="secret-key")
    assert connection.model_card().name == "llama"
    connection.close()
