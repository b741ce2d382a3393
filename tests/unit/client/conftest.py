"""Fixtures of the client's unit tests."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from tests.chat_templates import NOVEMBER


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is November in transformers."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(NOVEMBER.year, NOVEMBER.month, NOVEMBER.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
