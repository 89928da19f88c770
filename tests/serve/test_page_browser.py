"""Test the server's page in a real browser: a prompt, tokens as they arrive, and their probabilities."""

from __future__ import annotations

import os
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")

import npllama  # noqa: E402

from serving import served  # noqa: E402

CHROMIUM = os.environ.get("NPLLAMA_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
PATIENCE = 300_000.0  # milliseconds


@pytest.fixture
def page():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        page = browser.new_page(viewport={"width": 375, "height": 760})
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


def test_tokens_come_with_their_probabilities(page):
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    model = npllama.load()
    expected = npllama.complete(model, "ROMEO:", max_tokens=12, logprobs=5)
    with served(model) as server:
        here = f"http://127.0.0.1:{server.port}/"
        page.goto(here)
        page.wait_for_selector("h1:text-is('demo')")
        page.fill("#prompt", "ROMEO:")
        page.fill("#t", "0")
        page.fill("#n", "12")
        page.click("#go")
        page.wait_for_selector("#status:has-text('ended at the limit')")
        assert page.text_content("#out") == "ROMEO:" + expected.text
        tokens = page.locator("#out span")
        assert tokens.count() == 12
        for i in (1, 5):  # the first token is a line break, which can't be clicked
            tokens.nth(i).click()
            rows = page.locator("#top tr").all_text_contents()
            assert len(rows) == 5
            assert rows[0].endswith(f"{100 * 2.718281828 ** expected.logprobs[i].top[0][2]:.1f} %")
        page.locator("#t").evaluate("element => element.removeAttribute('max')")
        page.fill("#t", "101")
        page.click("#go")
        page.wait_for_selector("#status:has-text('Error: temperature is 101, expected 0 to 100')")
    assert all(url.startswith(here) for url in requests)
    # The browser itself reports the reply with status 400, and nothing else.
    assert [text for text in complaints if "400" not in text] == []
