"""A page in Debian's chromium. Requests to other hosts and messages on the console fail a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests import profiles, support
from tests.browser.scripted_gateway import ScriptedGateway
from tests.served_adapters import adapters as adapters
from tests.served_adapters import plm as plm

CHROMIUM = Path("/usr/bin/chromium")
# Longest wait for the page on a machine that is busy with other tests.
_TIMEOUT_MS = 60_000
expect.set_options(timeout=_TIMEOUT_MS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's chromium without a window."""
    if profiles.NO_BROWSER:
        pytest.skip("PEMA_TEST_NO_BROWSER is set")
    if not CHROMIUM.exists():
        pytest.fail(f"There is no {CHROMIUM}: `apt-get install chromium`, or set PEMA_TEST_NO_BROWSER=1.")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def gateway() -> ScriptedGateway:
    """The script of the gateway that `url` serves."""
    return ScriptedGateway()


@pytest.fixture
def url(gateway: ScriptedGateway) -> Iterator[str]:
    """Base URL of the gateway."""
    with support.run_app(gateway.app()) as base:
        yield base


@pytest.fixture
def console() -> list[str]:
    """Messages on the page's console. A test removes those that it expects; the others fail it."""
    return []


@pytest.fixture
def page(browser: Browser, url: str, console: list[str]) -> Iterator[Page]:
    """An empty page that may only call the gateway."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    foreign: list[str] = []

    def only_ours(route: Route) -> None:
        if route.request.url.startswith(f"{url}/"):
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    context.route("**/*", only_ours)
    opened = context.new_page()
    opened.set_default_timeout(_TIMEOUT_MS)
    opened.on("console", lambda message: console.append(message.text))
    opened.on("pageerror", lambda error: console.append(str(error)))
    yield opened
    context.close()
    assert not foreign
    assert not console
