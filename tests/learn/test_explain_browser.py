"""Open the page in a real browser: it loads without errors or requests, and shows the trace's numbers.

Needs chromium (or NPLLAMA_CHROMIUM, a path to one) and playwright's Python package; its own browsers are not needed.
"""

from __future__ import annotations

import os
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("bokeh", reason="bokeh is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from npllama import Sampling, load, record  # noqa: E402
from npllama.activations import TABLE  # noqa: E402
from npllama.learn.explain import explain, quoted  # noqa: E402
from npllama.learn.lens import logit_lens, residual_norms, token_label, visible  # noqa: E402
from npllama.sampling import probabilities  # noqa: E402

from hostile import HOSTILE, hostile_model  # noqa: E402

CHROMIUM = os.environ.get("NPLLAMA_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 760}
PATIENCE = 300_000.0  # milliseconds: only a page that hangs takes as long, on however busy a machine
PROMPT = "What light through yonder window"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer.encode(PROMPT, bos=True)


@pytest.fixture(scope="module")
def recording(model, ids):
    return record(model, ids)


@pytest.fixture(scope="module")
def file(model, ids, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    explain(model, ids, out)
    return out


@pytest.fixture
def opened(browser, file):
    """Open pages; at the end, check that none logged an error or made a network request."""
    contexts, complaints, requests = [], [], []

    def open_page(path=file, **options):
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        context.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints
    assert all(url.startswith("file://") and url.endswith(".html") for url in requests)
    assert len(requests) == len(contexts)


def token_labels(tokenizer, ids) -> list[str]:
    return [quoted(token_label(tokenizer, int(id))) for id in ids]


def looks(page) -> list[tuple[str, int, float]]:
    """Read the table of the tokens that the chosen one attends to."""
    rows = page.locator("#looks-table tbody tr").all_inner_texts()
    return [(token, int(at), float(weight.rstrip("%\u00a0 "))) for token, at, weight in (row.split("\t") for row in rows)]


def expected_looks(recording, labels, layer, head, token):
    row = recording[f"layers.{layer}.attention.weights"][head, token, : token + 1]
    order = np.argsort(-np.rint(65535 * row), kind="stable")[:8]
    return [(labels[at], at, 100 * row[at]) for at in order]


def same(found, expected) -> bool:
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    return np.allclose([row[2] for row in found], [row[2] for row in expected], atol=0.0051)


def test_the_numbers_are_the_trace_s(opened, model, ids, recording):
    page, config, T = opened(), model.config, len(ids)
    shape = (config.n_layers, config.n_heads, T, T)
    weights = page.evaluate(
        "Array.from({length: L}, (_, l) => Array.from({length: H}, (_, h) => Array.from({length: T}, (_, f) =>"
        " Array.from({length: T}, (_, a) => weight(l, h, f, a)))))"
    )
    expected = np.stack([recording[f"layers.{i}.attention.weights"] for i in range(config.n_layers)])
    assert expected.shape == shape
    assert np.abs(np.array(weights) - expected).max() <= 0.5 / 65535 + 1e-9
    norms = np.array(page.evaluate("source('norms').data.ys"))
    assert np.array_equal(norms.T.astype(np.float32), residual_norms(recording, config).astype(np.float32))
    lens_ids, lens = (x[..., 0] for x in logit_lens(model, recording, 1))
    rows = page.evaluate(
        "[...$('lens').tBodies[0].rows].map(row => [...row.cells].map(cell => [cell.textContent, "
        "cell.style.getPropertyValue('--p')]))"
    )
    assert [row[0][0] for row in rows] == [*(f"layer {i}" for i in reversed(range(config.n_layers))), "embedding"]
    for row, ids_, p in zip(rows, lens_ids[::-1], lens[::-1], strict=True):
        assert [text for text, _ in row[1:]] == token_labels(model.tokenizer, ids_)
        assert np.allclose([float(shade) for _, shade in row[1:]], p, atol=1e-4)
    assert page.locator("#lens thead th").all_text_contents()[1:] == token_labels(model.tokenizer, ids)
    assert [text.split("\n")[0] for text in page.locator("#tokens button").all_inner_texts()] == token_labels(
        model.tokenizer, ids
    )


def test_the_sliders_compute_what_sampling_does(opened, recording):
    page, logits = opened(), recording["logits"][-1]
    order = np.argsort(-logits, kind="stable")
    for temperature, top_p in [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (0.05, 1.0), (1.3, 0.05), (0.0, 0.3), (0.0, 1.0)]:
        for slider, value in (("#temperature", temperature), ("#top-p", top_p)):
            page.locator(slider).fill(str(value))
        expected = probabilities(logits, Sampling(temperature, top_p=top_p))[order]
        found = np.array(page.evaluate("Array.from(distribution(state.temperature, state.topP))"))
        assert np.array_equal(found > 0, expected > 0)
        assert np.allclose(found, expected, rtol=1e-12, atol=0)
        table = [row.split("\t") for row in page.locator("#candidates-table tbody tr").all_inner_texts()]
        assert [int(row[1]) for row in table] == order[:20].tolist()
        assert np.allclose([float(row[3].rstrip("%\u00a0 ")) for row in table], 100 * expected[:20], atol=0.0051)
        assert np.allclose(page.evaluate("Array.from(source('candidates').data.p)"), expected[:20], rtol=1e-12, atol=0)
        summary = page.inner_text("#summary")
        assert summary.startswith(f"{np.count_nonzero(expected):,} of {len(logits):,} tokens can be drawn")


def test_hover_shows_what_a_token_attends_to(opened, model, ids, recording):
    page, labels = opened(), token_labels(model.tokenizer, ids)
    for token in (3, len(ids) - 1, 0):
        page.locator("#tokens button").nth(token).hover()
        assert same(looks(page), expected_looks(recording, labels, 0, 0, token))
        assert page.locator("#tokens button[aria-pressed=true]").count() == 1
    # On the map: the middle of a cell, by Bokeh's own scales.
    page.locator("#attention-figure").scroll_into_view_if_needed()
    row, column = 5, 2
    x, y = page.evaluate(
        """([row, column]) => {
          const view = Bokeh.index.get_by_id(models.attention.id), frame = view.frame, box = view.el.getBoundingClientRect();
          return [box.x + frame.x_scale.compute(column), box.y + frame.y_scale.compute(row)];
        }""",
        [row, column],
    )
    page.mouse.move(x, y)
    page.wait_for_function("state.token === 5")
    assert same(looks(page), expected_looks(recording, labels, 0, 0, row))
    weight = recording["layers.0.attention.weights"][0, row, column]
    tip = f"{labels[row]} ({row}) attends to {labels[column]} ({column}): {100 * weight:.1f}%"
    page.get_by_text(tip).wait_for(state="visible")


def pick(section: str, name: str) -> str:
    """Return the selector of a section's control."""
    return f"section[aria-labelledby={section}-title] select[data-pick={name}]"


def test_layer_head_and_step_are_picked_with_the_keyboard(opened, model, ids, recording):
    page, labels = opened(), token_labels(model.tokenizer, ids)
    page.locator(pick("attention", "layer")).focus()
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.pick") == "head"
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    token = len(ids) - 1
    assert same(looks(page), expected_looks(recording, labels, 4, 2, token))
    shades = np.array(page.evaluate("Array.from(source('attention').data.weight)"))
    expected = recording["layers.4.attention.weights"][2][np.tril_indices(len(ids))]
    assert np.abs(shades - expected).max() <= 0.5 / 65535 + 1e-9

    page.locator("#tokens button").nth(token).focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("state.token") == 2
    assert same(looks(page), expected_looks(recording, labels, 4, 2, 2))

    page.locator("#temperature").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#temperature-value") == "0.00, greedy"
    page.locator("#step").focus()
    seen = []
    for _ in range(20):
        kind = page.evaluate("data.steps[state.step].kind")
        seen.append(kind)
        name = f"layers.4.{kind}" if page.evaluate("data.steps[state.step].in_layer") else kind
        x = recording[name]
        x = x[:, 2] if "scores" in name or "weights" in name else x[2]
        head = 2 * len(x) // model.config.n_heads  # of head 2: its own, or the key/value head that it shares
        kind = "head" if len(x) == model.config.n_heads else "key/value head"
        first = (x if x.ndim == 1 else x[head])[:4]
        which = "" if x.ndim == 1 else f", {kind} {head},"
        numbers = page.inner_text("#step-numbers")
        assert numbers.startswith(f"{name} of {labels[2]} (2){which} begins with ")
        shown = [float(part.replace("−∞", "-inf")) for part in numbers.rsplit("begins with ", 1)[1].rstrip(".").split(", ")]
        assert np.allclose(shown, first, rtol=6e-4)
        assert str(x.shape[-1]) in page.inner_text("#step-shape")
        assert "def " in page.inner_text("#step-code")
        assert page.inner_text("#step-line")
        page.keyboard.press("ArrowDown")
    assert seen == page.evaluate("data.steps.map(step => step.kind)")


# Names the focused element: a control of a section by both, a cell or button by what holds it.
ACTIVE = """(e => e.dataset.pick ? `${e.closest("section").getAttribute("aria-labelledby")} ${e.dataset.pick}`
  : e.id || e.closest("[role=toolbar], table")?.id)(document.activeElement)"""


def test_tab_reaches_every_control(opened):
    page, reached = opened(), set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(ACTIVE))
    assert {"theme", "tokens", "heads", "lens", "temperature", "top-p", "step"} <= reached
    where = {
        "tokens": "layer head",
        "attention": "layer head token",
        "lens": "token",
        "norms": "token",
        "steps": "layer head token",
    }
    assert {f"{section}-title {name}" for section, names in where.items() for name in names.split()} <= reached


def test_what_is_chosen_in_one_place_is_chosen_in_all(opened, recording, model, ids):
    page, labels = opened(), token_labels(model.tokenizer, ids)
    page.locator(pick("steps", "layer")).select_option("3")
    page.locator(pick("tokens", "head")).select_option("1")
    page.locator(pick("norms", "token")).select_option("2")
    for name, value in (("layer", "3"), ("head", "1"), ("token", "2")):
        found = page.locator(f"select[data-pick={name}]").evaluate_all("all => all.map(one => one.value)")
        assert len(found) >= 3
        assert set(found) == {value}
    assert same(looks(page), expected_looks(recording, labels, 3, 1, 2))
    assert page.inner_text("#lens-text").startswith(f"The whole model expects after {labels[2]} (2): “")
    page.locator("#heads button").nth(4).click()
    assert same(looks(page), expected_looks(recording, labels, 3, 4, 2))


def test_the_maps_of_all_heads_have_the_colours_of_their_weights(opened, recording, model, ids):
    page, T = opened(), len(ids)
    page.locator(pick("attention", "layer")).select_option("2")
    maps = page.evaluate(
        "[...document.querySelectorAll('#heads canvas')].map(c => [...c.getContext('2d').getImageData(0, 0, T, T).data])"
    )
    palette = np.array(page.evaluate("palette"))
    assert palette[0].tolist() == [68, 1, 84]  # viridis
    expected = recording["layers.2.attention.weights"]
    assert len(maps) == len(expected)
    for found, weights in zip(maps, expected, strict=True):
        pixels = np.array(found).reshape(T, T, 4)
        lower = np.tril_indices(T)
        assert np.array_equal(pixels[..., 3], np.where(np.tri(T) > 0, 255, 0)), "later keys are empty"
        shades = np.sqrt(np.rint(65535 * weights) / 65535)[lower]
        off = [
            np.abs(palette[np.clip(np.rint(255 * shades).astype(int) + d, 0, 255)] - pixels[lower][:, :3]) for d in (-1, 0, 1)
        ]
        assert np.min([x.sum(-1) for x in off], axis=0).max() == 0


def test_the_lens_is_walked_with_arrow_keys_and_taps(opened, model, ids, recording):
    page, labels, L = opened(has_touch=True), token_labels(model.tokenizer, ids), model.config.n_layers
    five, p = logit_lens(model, recording, 5)

    def expected(depth: int, token: int) -> str:
        words = token_labels(model.tokenizer, five[depth, token])
        return ", ".join(f"{word} {100 * x:.1f}\u00a0%" for word, x in zip(words, p[depth, token], strict=True))

    page.locator("#lens td[tabindex='0']").focus()
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    token = len(ids) - 2
    said = f"If layer {L - 3} were the last, the model would expect after {labels[token]} ({token}): {expected(L - 2, token)}."
    assert page.inner_text("#lens-text") == said
    assert page.evaluate("document.activeElement.textContent") == token_labels(model.tokenizer, five[L - 2, token])[0]
    page.locator("#lens tbody tr").last.locator("td").nth(1).tap()
    assert page.inner_text("#lens-text").endswith(f"after {labels[1]} (1): {expected(0, 1)}.")
    assert page.evaluate("state.token") == 1


def test_title_sentences_and_words_for_mouse_or_touch(opened):
    page = opened()
    assert page.title() == f"“{PROMPT}” – npllama explains"
    assert page.inner_text("h1") == f"npllama explains “{PROMPT}”"
    shown = page.inner_text("main")
    for kind in ("tok_embeddings", "attention.scores", "attention.weights", "attention_residual", "out", "norm", "logits"):
        assert TABLE[kind].sentence in shown
    assert "Point at a token" in shown
    assert "Tap a" not in shown
    phone = opened(viewport=PHONE, has_touch=True, is_mobile=True).inner_text("main")
    assert "Tap a token" in phone
    assert "Point at" not in phone
    assert "Click" not in phone


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("n_tokens", [3, 72])
def test_the_attention_map_fills_its_half_and_its_labels_have_room(n_tokens, viewport, opened, model, tmp_path):
    ids = (model.tokenizer.encode(PROMPT * 60, bos=True))[:n_tokens]
    explain(model, ids, tmp_path / "page.html")
    page = opened(tmp_path / "page.html", viewport=viewport)
    map_, half = (
        page.locator(name).bounding_box()["width"] for name in ("#attention-figure > *", ".scroll:has(#attention-figure)")
    )
    assert map_ == pytest.approx(max(half, 100 + 4 * n_tokens), abs=2)
    page.wait_for_function(
        "models.attention.left[0].ticker.ticks.length <= Bokeh.index.get_by_id(models.attention.id).frame.bbox.height / 12"
    )
    cell = page.evaluate("Bokeh.index.get_by_id(models.attention.id).frame.bbox.width / T")
    ticks = page.evaluate("[...models.attention.above[0].ticker.ticks]")
    assert ticks[0] == 0
    assert len(ticks) == n_tokens or 15 <= cell * ticks[1] < 15 + cell
    bar = page.evaluate("(bar => [bar.visible, bar.title])(models.attention.below.find(part => part.type === 'ColorBar'))")
    assert bar == [True, "weight, on a square-root scale"]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_wide_and_narrow(viewport, scheme, opened, tmp_path):
    """Check colours and width; screenshots go to the folder that NPLLAMA_SCREENSHOTS names."""
    page = opened(viewport=viewport, color_scheme=scheme, has_touch=viewport is PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]

    def brightness(colour: str) -> float:
        numbers = [int(x) for x in re.findall(r"\d+", colour)] if colour.startswith("rgb") else bytes.fromhex(colour[1:])
        return sum(numbers[:3]) / 3

    def sides() -> list[bool]:
        """Return whether the page is dark, and whether the figures' text is light."""
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        text = page.evaluate("models.attention.left[0].major_label_text_color")
        return [brightness(paper) < 128, brightness(text) >= 128]

    assert sides() == [scheme == "dark"] * 2
    if folder := os.environ.get("NPLLAMA_SCREENSHOTS"):
        page.screenshot(path=os.path.join(folder, f"{viewport['width']}-{scheme}.png"), full_page=True)
    page.locator("#theme").click()
    assert sides() == [scheme != "dark"] * 2
    if viewport is PHONE:
        page.locator("#tokens button").nth(1).tap()
        assert page.evaluate("state.token") == 1


def test_a_lens_wider_than_the_screen_begins_at_the_last_token_and_keeps_its_labels(opened, model, tmp_path):
    explain(model, model.tokenizer.encode(PROMPT * 8, bos=True), tmp_path / "page.html")
    page = opened(tmp_path / "page.html", viewport=PHONE)
    box = page.locator("#lens-scroll")
    assert box.evaluate("e => e.scrollWidth - e.clientWidth - e.scrollLeft") <= 1
    assert box.evaluate("e => e.scrollLeft") > 1000
    box.evaluate("e => { e.style.maxHeight = '80px'; e.scrollTo(500, 1000) }")
    outside = box.bounding_box()
    corner = page.locator("#lens thead th").first.bounding_box()
    last = page.locator("#lens tbody tr").last
    label, cells = last.locator("th").bounding_box(), last.locator("td")
    assert corner["y"] == pytest.approx(outside["y"], abs=2)
    assert label["x"] == pytest.approx(outside["x"], abs=2)
    assert page.locator("#lens thead th").nth(9).bounding_box()["y"] == pytest.approx(outside["y"], abs=2)
    assert cells.first.bounding_box()["x"] < outside["x"]  # scrolled under the label


def test_a_map_wider_than_the_screen_fades_where_there_is_more(opened, model, tmp_path):
    explain(model, (model.tokenizer.encode(PROMPT * 60, bos=True))[:100], tmp_path / "page.html")
    page = opened(tmp_path / "page.html", viewport=PHONE)
    page.locator(".scroll.after:not(.before):has(#attention-figure)").wait_for()
    page.locator(".scroll:has(#attention-figure)").evaluate("e => { e.scrollLeft = e.scrollWidth }")
    page.locator(".scroll.before:not(.after):has(#attention-figure)").wait_for()


def test_a_hostile_prompt_is_text(opened, tmp_path):
    explain(hostile_model(), [1, 2], tmp_path / "hostile.html")
    page = opened(tmp_path / "hostile.html")
    assert page.title().startswith("“</script>")
    assert page.locator("#tokens button").all_text_contents() == [quoted(visible(HOSTILE)) + id for id in "12"]
    assert page.locator("b, #tokens script").count() == 0


@pytest.mark.parametrize("n_tokens", [1, 200])
def test_one_token_and_many(n_tokens, opened, model, tmp_path):
    ids = (model.tokenizer.encode(PROMPT * 60, bos=True))[:n_tokens]
    explain(model, ids, tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert page.locator("#tokens button").count() == n_tokens
    assert looks(page)
