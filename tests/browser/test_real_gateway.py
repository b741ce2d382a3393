"""The playground in a real browser, against the real gateway in front of a tiny PLM."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from playwright.sync_api import Page, Request, Route, expect

from data_owner_client import Generation, TrainedAdapter, translate
from data_owner_client.adapter.interpolation import Interpolation
from data_owner_client.decoding.token_choice import TokenChoice
from data_owner_client.plm.remote_plm import RemotePlm
from tests import support
from tests.gateways import WatchedPlm, gateway
from tests.served_adapters import INTERPOLATIONS, PAIRS, TASK

pytestmark = pytest.mark.unguarded("one way to the owner is enough")
SOURCE = PAIRS[1].source
ADAPTER, OTHER_ADAPTER = "constant", "gradual"
ADAPTED, ALONE = ".answer:nth-of-type(1)", ".answer:nth-of-type(2)"
MARKUP = "<img src=x onerror=\"document.title='owned'\">"
EMOJI = "\N{HOUSE BUILDING}"
KEY = "a-key-of-the-tests"
CALL_SECONDS = 1.0
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS") or tempfile.gettempdir()) / "pema-playground"


class SlowPlm(WatchedPlm):
    """A PLM each of whose calls takes a while."""

    def __init__(self, plm: RemotePlm) -> None:
        super().__init__(plm)
        self._never = threading.Event()
        self.seconds = 0.0

    def before_call(self, prompts: Sequence[Sequence[int]]) -> None:
        self._never.wait(self.seconds)


@pytest.fixture(scope="module")
def slow_plms() -> list[SlowPlm]:
    """The PLM of the gateway that runs."""
    return []


@pytest.fixture(scope="module")
def real_url(tiny_server: str, adapters: dict[str, Path], slow_plms: list[SlowPlm]) -> Iterator[str]:
    def wrap(plm: RemotePlm) -> SlowPlm:
        slow_plms.append(SlowPlm(plm))
        return slow_plms[0]

    with gateway(tiny_server, adapters, wrap=wrap) as address:
        yield address


@pytest.fixture
def url(real_url: str, slow_plms: list[SlowPlm]) -> str:
    """Address of the real gateway, whose PLM is as fast as it can be."""
    slow_plms[0].seconds = 0.0
    return real_url


@pytest.fixture
def bodies(page: Page) -> list[dict[str, Any]]:
    """Bodies of the page's requests for answers."""
    seen: list[dict[str, Any]] = []

    def keep(request: Request) -> None:
        if request.method == "POST":
            seen.append(json.loads(request.post_data or ""))

    page.on("request", keep)
    return seen


@pytest.fixture
def adapter(adapters: dict[str, Path]) -> TrainedAdapter:
    return TrainedAdapter.load(adapters[ADAPTER])


def ask(page: Page, url: str, name: str = ADAPTER, text: str = SOURCE) -> None:
    page.goto(url)
    page.select_option("#model", name)
    page.fill("#prompt", text)
    page.click("#run")


def finished(page: Page, *answers: str) -> None:
    for answer in answers or (ADAPTED, ALONE):
        page.locator(f"{answer} .status", has_text="Ended").wait_for()


def text_of(page: Page, answer: str) -> str:
    return page.locator(f"{answer} .text").text_content() or ""


def ids_of(page: Page, answer: str) -> list[int]:
    ids: list[int] = page.locator(f"{answer} .tokens button").evaluate_all("all => all.map(one => +one.dataset.id)")
    return ids


def numbers_of(page: Page, answer: str) -> list[tuple[str, float]]:
    """Class and share of each token."""
    found = page.locator(f"{answer} .tokens button").evaluate_all(
        "all => all.map(one => [one.dataset.decided, Number(one.style.getPropertyValue('--share'))])"
    )
    return [(decided, share) for decided, share in found]


def expected_numbers(choice: TokenChoice) -> tuple[str, Any]:
    """Class and share of a token, from the names of both sides' favourites that `--explain` writes."""
    decided = {(True, True): "both", (True, False): "plm", (False, True): "adapter", (False, False): "neither"}
    share = 0.0
    if choice.pema_logprob is not None:
        p_plm, p_pema = (2.718281828459045**value for value in (choice.plm_logprob, choice.pema_logprob))
        share = choice.lambda_t * p_pema / ((1 - choice.lambda_t) * p_plm + choice.lambda_t * p_pema)
    key = choice.token == choice.plm_token, choice.token == choice.pema_token
    return decided[key], pytest.approx(share, abs=1e-5)


def require_answer(page: Page, answer: str, expected: Generation) -> None:
    assert text_of(page, answer) == expected.texts[0]
    assert ids_of(page, answer) == expected.token_ids[0]


def active_answers(url: str) -> float:
    """Answers that take part in rounds or wait for a place."""
    found = re.findall(r"^pema_gateway_(?:waiting|active)_answers (\S+)$", httpx.get(f"{url}/metrics").text, re.M)
    assert len(found) == 2
    return sum(map(float, found))


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_tokens_are_those_of_translate(
    page: Page, url: str, plm: RemotePlm, adapters: dict[str, Path], name: str
) -> None:
    expected = translate(plm, [SOURCE], adapter=TrainedAdapter.load(adapters[name]))
    ask(page, url, name)
    finished(page)
    require_answer(page, ADAPTED, expected)
    assert numbers_of(page, ADAPTED) == [expected_numbers(choice) for choice in expected.choices[0]]


def test_tokens_stream_in(page: Page, url: str, plm: RemotePlm, adapter: TrainedAdapter) -> None:
    page.add_init_script(
        "window.counts = []; addEventListener('DOMContentLoaded', () => new MutationObserver(() => "
        f"counts.push(document.querySelectorAll('{ADAPTED} .tokens button').length))"
        ".observe(document.body, {childList: true, subtree: true}))"
    )
    ask(page, url)
    finished(page)
    counts = page.evaluate("counts")
    assert counts == sorted(counts)
    assert len({*counts} - {0}) > 2
    require_answer(page, ADAPTED, translate(plm, [SOURCE], adapter=adapter))


def test_model_alone_is_beside_it_and_differences_are_marked(
    page: Page, url: str, plm: RemotePlm, adapter: TrainedAdapter, bodies: list[dict[str, Any]]
) -> None:
    ask(page, url)
    finished(page)
    require_answer(page, ALONE, translate(plm, [SOURCE], task=TASK))
    # No token has the colour of a decision where the adapter has no part.
    expect(page.locator(f"{ALONE} .tokens button:not(.alone)")).to_have_count(0)
    assert bodies[0]["messages"] == bodies[1]["messages"]
    ids = [ids_of(page, answer) for answer in (ADAPTED, ALONE)]
    assert ids[0] != ids[1]
    common = []
    for answer, own in zip((ADAPTED, ALONE), ids, strict=True):
        marked = page.locator(f"{answer} .tokens button").evaluate_all(
            "all => all.map(one => one.classList.contains('differs'))"
        )
        assert any(marked)
        common.append([id_ for id_, differs in zip(own, marked, strict=True) if not differs])
    # What is not marked is in both texts, in the same order.
    assert common[0] == common[1]


def test_alternative_goes_on_from_there(page: Page, url: str, plm: RemotePlm, adapter: TrainedAdapter) -> None:
    first = translate(plm, [SOURCE], adapter=adapter, alternatives=5).choices[0]
    at, other = next(
        (at, token)
        for at, choice in enumerate(first)
        if at and choice.alternatives
        for token, _ in choice.alternatives.pema
        # Another token that goes on with the answer.
        if token != choice.token and plm.tokenizer.decode([token]).strip()
    )
    ask(page, url)
    finished(page)
    page.locator(f"{ADAPTED} .tokens button").nth(at).click()
    page.locator(f"#details .pema_top button[data-id='{other}']").click()
    page.locator(f"{ADAPTED} .tokens button[data-decided=you]").wait_for()
    finished(page)
    prefix = [*(choice.token for choice in first[:at]), other]
    assert ids_of(page, ADAPTED)[: len(prefix)] == prefix
    require_answer(page, ADAPTED, translate(plm, [SOURCE], adapter=adapter, prefix=prefix))
    # The other answer stays as it is.
    require_answer(page, ALONE, translate(plm, [SOURCE], task=TASK))


@pytest.fixture
def says(page: Page) -> Callable[[str], None]:
    """Let the model write a text: a choice of one, which the page itself never asks for."""

    def say(text: str) -> None:
        def change(route: Route) -> None:
            body = json.loads(route.request.post_data or "") | {"guided_choice": [text]}
            route.continue_(post_data=json.dumps(body))

        page.route("**/v1/chat/completions", change)

    return say


def test_written_markup_stays_text(page: Page, url: str, says: Callable[[str], None]) -> None:
    says(MARKUP)
    ask(page, url, text="on")
    finished(page)
    assert text_of(page, ADAPTED) == text_of(page, ALONE) == MARKUP
    assert page.locator("img").count() == 0
    assert page.title() == "PEMA playground"


def test_emoji_over_tokens_is_whole(page: Page, url: str, says: Callable[[str], None]) -> None:
    says(f"on {EMOJI}!")
    ask(page, url, text="on")
    finished(page)
    assert text_of(page, ADAPTED) == f"on {EMOJI}!"
    pieces = page.locator(f"{ADAPTED} .tokens button").all_text_contents()
    assert "".join(pieces).count("‹F0›") == 1
    assert EMOJI not in "".join(pieces)


def test_alternative_that_ends_the_answer(
    page: Page, url: str, plm: RemotePlm, adapter: TrainedAdapter, console: list[str]
) -> None:
    expected = translate(plm, [SOURCE], adapter=adapter)
    ask(page, url)
    finished(page)
    page.locator(f"{ADAPTED} .tokens button").last.click()
    page.locator("#details [aria-current]").first.click()
    page.locator(f"{ADAPTED} .status", has_text="It ends with the token that you chose.").wait_for()
    # Also without the space around it.
    require_answer(page, ADAPTED, expected)
    assert page.locator(f"{ADAPTED} .error").is_hidden()
    assert all("400" in message for message in console)
    console.clear()


@pytest.mark.parametrize("way", ["button", "leaving"])
def test_stopping_ends_the_calls(page: Page, url: str, slow_plms: list[SlowPlm], way: str) -> None:
    slow = slow_plms[0]
    before = slow.calls
    ask(page, url)
    finished(page)
    whole = slow.calls - before
    slow.seconds = CALL_SECONDS
    before = slow.calls
    page.click("#run")
    page.locator(f"{ADAPTED} .tokens button").first.wait_for()
    if way == "button":
        page.click("#stop")
        page.locator(f"{ADAPTED} .status", has_text="Stopped").wait_for()
    else:
        page.goto("about:blank")
    support.until(lambda: active_answers(url) == 0, within_s=30)
    assert slow.calls - before < whole


def test_adapter_tab_shows_the_facts(page: Page, url: str) -> None:
    facts = httpx.get(f"{url}/pema/adapters/{OTHER_ADAPTER}").json()
    page.goto(url)
    page.select_option("#model", OTHER_ADAPTER)
    page.click("#tab-adapter")
    view = page.locator("#view-adapter")
    view.locator("h2", has_text=OTHER_ADAPTER).wait_for()
    shown = view.inner_text()
    assert facts["context_mode"] in shown
    assert all(f"{facts['memory'][name]:,}" in shown for name in ("pairs", "rows"))
    assert facts["history"]
    assert view.locator("figure polyline").count() > 0
    page.screenshot(path=SCREENSHOTS / "real-adapter.png", full_page=True)


def test_controls_change_the_request_and_the_answer(
    page: Page, url: str, plm: RemotePlm, adapter: TrainedAdapter, bodies: list[dict[str, Any]]
) -> None:
    page.goto(url)
    page.select_option("#schedule", "constant")
    page.fill("#lambda-max", "0.9")
    page.select_option("#model", ADAPTER)
    page.fill("#prompt", SOURCE)
    page.click("#run")
    finished(page)
    assert {"explain": True, "schedule": "constant", "lambda_max": 0.9} in [body["pema"] for body in bodies]
    mixture = Interpolation(schedule="constant", lambda_max=0.9)
    require_answer(page, ADAPTED, translate(plm, [SOURCE], adapter=adapter, interpolation=mixture))
    greedy = ids_of(page, ADAPTED)
    page.fill("#temperature", "2")
    page.click("#run")
    page.locator(f"{ADAPTED} .tokens button").first.wait_for()
    finished(page)
    assert bodies[-1]["temperature"] == bodies[-2]["temperature"] == 2
    assert ids_of(page, ADAPTED) != greedy


def test_owner_was_shown_what_it_was_sent(page: Page, url: str, plm: RemotePlm, adapter: TrainedAdapter) -> None:
    body = {
        "model": ADAPTER,
        "messages": [{"role": "user", "content": SOURCE}],
        "pema": {"explain": True},
    }
    expected = httpx.post(f"{url}/v1/chat/completions", json=body).json()["pema"]["shown"]
    ask(page, url)
    finished(page)
    shown = dict(
        zip(
            page.locator(f"{ADAPTED} .shown dt").all_text_contents(),
            page.locator(f"{ADAPTED} .shown dd").all_text_contents(),
            strict=True,
        )
    )
    assert shown["Tokens"] == f"{expected['tokens']:,}"
    assert shown["Round trips"] == f"{expected['round_trips']:,}"
    assert int(shown["Bytes received"].replace(",", "")) > 0
    prompt = plm.tokenizer.encode_prompt(TASK.prompt(SOURCE, plm.tokenizer))
    assert int(shown["Tokens"].replace(",", "")) >= len(prompt)


def test_page_works_with_the_keyboard(page: Page, url: str) -> None:
    page.goto(url)
    page.focus("#model")
    page.keyboard.type(OTHER_ADAPTER)
    page.focus("#prompt")
    page.keyboard.type(SOURCE)
    page.keyboard.press("Control+Enter")
    finished(page)
    page.locator(f"{ADAPTED} .tokens button").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(f"{ADAPTED} .tokens button").nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#details button").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(f"{ADAPTED} .tokens button").nth(1)).to_be_focused()


def test_key_of_the_gateway_is_asked_for(
    page: Page, url: str, tiny_server: str, adapters: dict[str, Path], console: list[str]
) -> None:
    with gateway(tiny_server, {ADAPTER: adapters[ADAPTER]}, gateway_key=KEY) as guarded:
        page.context.unroute_all()
        page.goto(guarded)
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.locator("#key-dialog .error").wait_for()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.locator(f"#model option[value={ADAPTER}]").wait_for(state="attached")
        page.fill("#prompt", SOURCE)
        page.click("#run")
        finished(page)
    assert all("401" in message for message in console)
    console.clear()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 360), ("dark", 360)])
def test_page_fits(page: Page, url: str, scheme: Literal["light", "dark"], width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    ask(page, url, OTHER_ADAPTER)
    finished(page)
    page.screenshot(path=SCREENSHOTS / f"real-{scheme}-{width}-answers.png", full_page=True)
    page.locator(f"{ADAPTED} .tokens button").nth(1).focus()
    page.locator("#details").wait_for()
    page.screenshot(path=SCREENSHOTS / f"real-{scheme}-{width}-details.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#tab-adapter")
    page.locator("#view-adapter h2").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=SCREENSHOTS / f"real-{scheme}-{width}-adapter.png", full_page=True)
