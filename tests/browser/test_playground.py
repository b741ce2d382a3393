"""The playground in a real browser, against scripted answers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Page, expect

from tests import support
from tests.browser.scripted_gateway import ADAPTER, DECIDED, FACTS, KEY, PIECES, PLM_PIECES, ScriptedGateway, tokens

TEXT = b"".join(PIECES).decode()
ADAPTED, ALONE = ".answer:nth-of-type(1)", ".answer:nth-of-type(2)"
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS") or tempfile.gettempdir()) / "pema-playground"


def ask(page: Page, url: str, text: str = "the house") -> None:
    page.goto(url)
    page.locator(f"#model option[value={ADAPTER}]").wait_for(state="attached")
    page.fill("#prompt", text)
    page.click("#run")


def finished(page: Page, url: str) -> None:
    ask(page, url)
    for answer in (ADAPTED, ALONE):
        page.locator(f"{answer} .status", has_text="Ended by itself").wait_for()


def test_tokens_appear_one_by_one(page: Page, url: str, gateway: ScriptedGateway) -> None:
    gateway.gated = True
    ask(page, url)
    shown = page.locator(f"{ADAPTED} .tokens button")
    page.locator(ADAPTED).wait_for()
    expect(shown).to_have_count(0)
    for number in range(1, len(PIECES) + 1):
        gateway.released = number
        expect(shown).to_have_count(number)
    page.locator(f"{ADAPTED} .status", has_text="Ended by itself").wait_for()


def test_tokens_have_their_class_and_share(page: Page, url: str) -> None:
    finished(page, url)
    found = page.locator(f"{ADAPTED} .tokens button").evaluate_all(
        "all => all.map(one => [one.dataset.decided, Number(one.style.getPropertyValue('--share'))])"
    )
    assert found == [[one["decided_by"], one["share"]] for one in tokens(PIECES, alone=False)]
    styles = page.locator(f"{ADAPTED} .tokens button").evaluate_all(
        "all => all.map(one => getComputedStyle(one).textDecorationStyle)"
    )
    assert len({*zip(DECIDED, styles, strict=True)}) == len({*styles}) == len({*DECIDED})


def test_text_has_whole_characters_and_tokens_their_pieces(page: Page, url: str) -> None:
    finished(page, url)
    assert page.locator(f"{ADAPTED} .text").text_content() == TEXT
    pieces = page.locator(f"{ADAPTED} .tokens button").all_text_contents()
    assert pieces[3:6] == ["‹20›‹F0›‹9F›", "‹8F›‹A0›", "⏎"]


def test_text_of_the_model_stays_text(page: Page, url: str) -> None:
    finished(page, url)
    assert page.locator("img").count() == 0
    assert page.title() == "PEMA playground"
    assert "<img src=x" in page.locator(f"{ADAPTED} .text").inner_text()


def test_policy_stops_scripts_in_the_page(page: Page, url: str, console: list[str]) -> None:
    response = page.goto(url)
    assert response is not None
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    support.until(lambda: page.evaluate("1") == len(console), within_s=30)
    assert "Content Security Policy" in console.pop()


def test_stop_hangs_up_on_both_answers(page: Page, url: str, gateway: ScriptedGateway) -> None:
    gateway.gated, gateway.released = True, 1
    ask(page, url)
    page.locator(f"{ADAPTED} .tokens button").wait_for()
    page.locator(f"{ALONE} .tokens button").wait_for()
    page.click("#stop")
    page.locator(f"{ADAPTED} .status", has_text="Stopped").wait_for()
    support.until(lambda: gateway.aborted == 2, within_s=30)
    assert page.locator("#stop").is_disabled()


def test_keyboard_shows_details_and_goes_on_from_an_alternative(page: Page, url: str, gateway: ScriptedGateway) -> None:
    finished(page, url)
    page.locator(f"{ADAPTED} .tokens button").first.focus()
    page.keyboard.press("ArrowRight")
    details = page.locator("#details")
    details.wait_for()
    for part in ("λ 0.70", "share 80 %", "not listed 3.0 %", "Model (PLM)", "Adapter", "60 %", "25 %", "0 %"):
        assert part in details.inner_text()
    page.keyboard.press("Escape")
    assert details.is_hidden()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator(f"{ADAPTED} .tokens button[data-decided=you]").wait_for()
    page.locator(f"{ADAPTED} .status", has_text="Ended by itself").wait_for()
    prefix = gateway.requests[-1]["pema"]["prefix"]
    assert prefix == [tokens(PIECES, alone=False)[0]["id"], 900 + len(" Heim")]
    assert page.locator(f"{ADAPTED} .text").text_content() == "Das Heim" + b"".join(PIECES[2:]).decode()


def test_pointer_shows_details(page: Page, url: str) -> None:
    finished(page, url)
    page.locator(f"{ADAPTED} .tokens button").first.hover()
    page.locator("#details .pema_top button").first.hover()
    assert page.locator("#details").is_visible()


def test_differences_are_marked(page: Page, url: str) -> None:
    finished(page, url)
    expect(page.locator(".answer .differs")).to_have_count(len(PIECES) - 1 + len(PLM_PIECES) - 1)
    for answer, pieces in ((ADAPTED, PIECES), (ALONE, PLM_PIECES)):
        marked = page.locator(f"{answer} .tokens button").evaluate_all(
            "all => all.map(one => one.classList.contains('differs'))"
        )
        assert marked == [piece != b"Das" for piece in pieces]


def test_controls_change_the_request(page: Page, url: str, gateway: ScriptedGateway) -> None:
    page.goto(url)
    page.select_option("#schedule", "constant")
    page.fill("#lambda-max", "0.4")
    page.fill("#temperature", "0.7")
    page.fill("#prompt", "the house")
    page.click("#run")
    page.locator(f"{ALONE} .status", has_text="Ended by itself").wait_for()
    adapted, alone = sorted(gateway.requests, key=lambda body: body["pema"]["schedule"])
    assert adapted["pema"] == {"explain": True, "schedule": "constant", "lambda_max": 0.4}
    assert alone["pema"] == {"explain": True, "schedule": "none"}
    assert adapted["temperature"] == alone["temperature"] == 0.7


def test_owner_was_shown(page: Page, url: str) -> None:
    finished(page, url)
    shown = page.locator(f"{ADAPTED} .shown").inner_text()
    assert all(number in shown for number in ("1,234", "7", "4,321", "98,765", "5,000 tokens left"))
    assert page.locator(f"{ADAPTED} .lambda polyline").count() == 1


def test_errors_are_shown(page: Page, url: str, console: list[str]) -> None:
    ask(page, url, "too long")
    page.locator(f"{ADAPTED} .error", has_text="The text is too long. (messages)").wait_for()
    page.locator(f"{ALONE} .error", has_text="The text is too long.").wait_for()
    assert all("400" in message for message in console)
    console.clear()


def test_key_is_asked_for(page: Page, url: str, gateway: ScriptedGateway, console: list[str]) -> None:
    gateway.wants_key = True
    page.goto(url)
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.locator(f"#model option[value={ADAPTER}]").wait_for(state="attached")
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert all("401" in message for message in console)
    console.clear()


def test_adapter_tab_shows_what_is_recorded(page: Page, url: str) -> None:
    page.goto(url)
    page.locator(f"#model option[value={ADAPTER}]").wait_for(state="attached")
    page.focus("#tab-text")
    page.keyboard.press("ArrowRight")
    view = page.locator("#view-adapter")
    view.locator("figure polyline").first.wait_for()
    assert view.locator("tr", has_text="✓ chosen").inner_text().split() == ["✓", "chosen", "16", "1.9"]
    assert "12,345" in view.inner_text()
    assert str(FACTS["context_mode"]) in view.inner_text()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 360)])
def test_page_fits(page: Page, url: str, scheme: Literal["light", "dark"], width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    finished(page, url)
    page.locator(f"{ADAPTED} .tokens button").nth(1).focus()
    page.locator("#details").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=SCREENSHOTS / f"{scheme}-{width}.png", full_page=True)
