"""Long work of a start tells: its beginning, that it goes on, its end."""

from __future__ import annotations

import logging

import pytest

from plm_owner_server import logs
from plm_owner_server.logs import logged_while
from tests.support import until

LOG = logging.getLogger(__name__)


def test_long_work_is_reported_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "_REPORT_SECONDS", 0.01)
    with caplog.at_level(logging.INFO), logged_while(LOG, "loading a model"):
        assert caplog.messages[0] == "loading a model"
        until(lambda: len(caplog.messages) > 2, within_s=60)
    assert all(line.startswith("still loading a model, for ") for line in caplog.messages[1:-1])
    assert caplog.messages[-1].startswith("loading a model took ")


def test_work_that_fails_does_not_report_its_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="damaged"), logged_while(LOG, "loading"):
        raise ValueError("damaged")
    assert caplog.messages == ["loading"]
