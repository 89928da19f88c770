"""Open the page in a real browser: at 1,280 pixels the last column is visible."""

from __future__ import annotations

import os
import shutil

import pytest

from npllama.golden.compare import compare, html

from candidates import save_npz

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("NPLLAMA_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


def test_the_last_column_is_on_the_screen(traces, arrays, tmp_path):
    arrays["layers.1.attention.scores"][..., 0] = -1e9  # the longest text of the last column
    arrays["layers.0.ffn_norm"] *= 1e12
    found = compare(traces / "reference", save_npz(tmp_path, arrays))
    for row in found.rows:
        row.name = row.name.replace("layers.", "step.10/layers.10")
    (tmp_path / "page.html").write_text(html.page(found))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=300_000)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto((tmp_path / "page.html").as_uri())
        right = page.evaluate(
            "Math.max(...[...document.querySelectorAll('td:last-child')].map(x => x.getBoundingClientRect().right))"
        )
        browser.close()
    assert 1100 < right <= 1280 - 15
