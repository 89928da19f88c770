"""Plots: each kind at every length, size and font, with any tokens; its numbers are those that the taps record."""

from __future__ import annotations

import functools
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from npllama import Precision, load, ops, record  # noqa: E402
from npllama.checkpoint import Model  # noqa: E402
from npllama.cli import main  # noqa: E402
from npllama.golden import trace  # noqa: E402
from npllama.golden.compare import compare  # noqa: E402
from npllama.golden.compare.report import as_dict, write_report  # noqa: E402
from npllama.learn import figure as figures  # noqa: E402
from npllama.learn import plot  # noqa: E402
from npllama.learn.lens import logit_lens, residual_norms  # noqa: E402

from tiny import CONFIGS, random_params, random_tokens  # noqa: E402

STRANGE = [
    " ",
    "\n",
    "\n\n",
    "\t",
    "你好",
    "，",
    "\u0301",
    "e\u0301",
    "\u200b",
    "$x$",
    "$",
    "$_^{$",
    "<b>",
    "한",
    "🦙",
    "\udce4",
    "\x00",
]


class StrangeTokenizer:
    """Tokens that are hard to draw."""

    vocab_size, silent_ids, special_tokens = 131, frozenset(), {}

    def token_bytes(self, id, opening):
        return STRANGE[id % len(STRANGE)].encode("utf-8", "surrogateescape")


@pytest.fixture
def model():
    config = CONFIGS["llama3.1"]  # with scaled frequencies and grouped queries
    made = Model(config, random_params(config, seed=1))
    made.__dict__["tokenizer"] = StrangeTokenizer()
    return made


def subject(model, n_tokens=17, **choice) -> plot.Subject:
    return plot.Subject(model, random_tokens(model.config, 3, n_tokens).tolist(), **choice)


def drawn(draw, size=None, font=None, **given) -> Figure:
    return figures.drawn(functools.partial(draw, **given), size, font)


def images(figure: Figure) -> list[np.ma.MaskedArray]:
    return [image.get_array() for axes in figure.axes for image in axes.images]


def texts(figure: Figure) -> list[str]:
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found]


def between_ticks(axis) -> list[tuple[float, float, str]]:
    """Yield each label of an axis with the ticks before and after it."""
    major, minor = axis.get_majorticklocs(), axis.get_minorticklocs()
    labels = [text.get_text() for text in axis.get_ticklabels(minor=True)]
    return [
        (max(x for x in major if x < at), min(x for x in major if x > at), label)
        for at, label in zip(minor, labels, strict=True)
    ]


@pytest.mark.parametrize("kind", plot.KINDS)
@pytest.mark.parametrize("n_tokens", [1, 17, 200])
def test_every_kind_at_every_length(kind, n_tokens, model, tmp_path):
    """Draw with warnings as errors: a glyph that no font has would be one."""
    out = tmp_path / f"{kind}.png"
    plot.plot(kind, subject(model, n_tokens, layer=1, heads=(5,)), out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == [out.name]


def test_svg_is_the_same_each_time(model, tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.SVG"
    for out in (first, second):
        plot.plot("tokens", subject(model, 5), out)
    assert b"<svg" in first.read_bytes()
    assert first.read_bytes() == second.read_bytes()


def test_attention_shows_what_the_taps_do(model):
    given = subject(model, layer=1, heads=(4,))
    seen = record(model, given.ids)
    scores, weights = seen["layers.1.attention.scores"][4], seen["layers.1.attention.weights"]
    shown = images(drawn(plot.draw_attention, subject=given))
    unmasked, masked, softmax, heads = shown[0], shown[1], shown[2], shown[3:9]
    visible = ~np.isneginf(scores)
    assert np.array_equal(unmasked[visible], scores[visible])
    assert np.isfinite(unmasked).all(), "the first map is from before the mask"
    assert np.array_equal(np.ma.getmaskarray(masked), ~visible)
    assert np.array_equal(masked.compressed(), scores[visible])
    for shown, expected in ((softmax, weights[4]), *zip(heads, weights, strict=True)):
        assert np.array_equal(np.ma.getmaskarray(shown), ~visible)
        assert np.array_equal(shown.compressed(), expected[visible])


def test_few_tokens_have_numbers_in_their_cells(model):
    given = subject(model, 5)
    weights = record(model, given.ids)["layers.0.attention.weights"][0]
    found = texts(drawn(plot.draw_attention, subject=given))
    assert found.count("−∞") == 5 * 4 / 2
    assert set(found) >= {f"{weight:.2f}" for weight in weights[np.tril_indices(5)]}


def test_mask_is_where_the_scores_are_minus_infinity(model):
    given = subject(model)
    hidden = np.isneginf(record(model, given.ids)["layers.0.attention.scores"][0])
    figure = drawn(plot.draw_mask, subject=given)
    assert np.array_equal(np.ma.getmaskarray(images(figure)[0]), hidden)
    assert texts(figure).count("−∞") == hidden.sum()
    assert texts(figure).count("0") == (~hidden).sum()


def test_residual_has_a_line_for_each_token(model):
    given = subject(model)
    norms = residual_norms(record(model, given.ids), model.config)
    axes = drawn(plot.draw_residual, subject=given).axes[0]
    lines = axes.lines
    assert np.array_equal(np.stack([line.get_ydata() for line in lines[:17]], axis=1), norms)
    assert lines[-1].get_label().startswith(f"largest at the end: position {norms[-1].argmax()}, ")
    assert between_ticks(axes.xaxis) == [(i, i + 1, str(i)) for i in range(model.config.n_layers)]


@pytest.mark.parametrize("n_tokens", [17, 60])
def test_logit_lens_shows_every_layer_and_position_once(n_tokens):
    config = CONFIGS["odd_ffn"]
    given = subject(Model(config, random_params(config, seed=1)), n_tokens)
    ids, p = logit_lens(given.model, record(given.model, given.ids), 1)
    strips = [axes for axes in drawn(plot.draw_logit_lens, subject=given).axes if axes.texts]
    assert np.array_equal(np.concatenate([axes.images[0].get_array() for axes in strips], axis=1), p[..., 0])
    found, start = np.full(ids.shape[:2], -1), 0
    for axes in strips:
        for text in axes.texts:
            column, row = text.get_position()
            found[row, start + column] = int(text.get_text())
        start += axes.images[0].get_array().shape[1]
    assert np.array_equal(found, ids[..., 0])


@pytest.mark.parametrize("position", [None, 0, 5])
def test_rope_says_how_far_each_pair_is_rotated(position, model):
    given, at = subject(model, 9, layer=1, heads=(2,), position=position), 8 if position is None else position
    frequencies = ops.rope_frequencies(model.config.head_dim, model.config.rope_theta, model.config.rope_scaling, np.float64)
    figure = drawn(plot.draw_rope, subject=given)
    titles = [axes.get_title() for axes in figure.axes[: model.config.head_dim // 2]]
    assert titles == [f"{j}: {round(np.degrees(at * frequency)) % 360}°" for j, frequency in enumerate(frequencies)]
    unscaled, scaled = (line.get_ydata() for line in figure.axes[-1].lines[:2])
    assert np.array_equal(scaled, frequencies)
    assert [line.get_xdata().tolist() for line in figure.axes[-1].lines[:2]] == [list(range(len(frequencies)))] * 2
    assert any(text.startswith(f"RoPE at position {at}, ") for text in texts(figure))
    assert (unscaled >= scaled).all()
    assert unscaled[-1] == pytest.approx(8 * scaled[-1])  # Llama 3.1's factor


def test_tokens_are_all_there_with_their_ids(model):
    given = subject(model, 60)
    shown = [text.get_text() for text in drawn(plot.draw_tokens, subject=given).axes[0].texts]
    assert shown[1::2] == [str(id) for id in given.ids]
    assert set(shown[0::2]) >= {"·", "↵", "⇥", "$x$"}


def test_where_no_font_has_a_glyph_its_code_is_shown(monkeypatch):
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    figures.fonts_for.cache_clear()
    with matplotlib.rc_context():
        assert figures.drawable(["你好", "␣é", "·"]) == ["<U+4F60><U+597D>", "·é", "<U+00B7>"]
    figures.fonts_for.cache_clear()


# ------------------------------------------------------------------------------------------------- size, text, colours


SLIDE = (1280, 720)
LOOKS = [(kind, 60, SLIDE, None) for kind in [*plot.KINDS, "heads"]]
LOOKS += [
    ("attention", 60, SLIDE, 20),
    ("logit-lens", 60, SLIDE, 20),
    ("rope", 6, SLIDE, 20),
    ("attention", 6, (640, 480), None),
]


@pytest.mark.parametrize(("kind", "n_tokens", "size", "font"), LOOKS, ids=str)
def test_texts_do_not_overlap_and_are_within_the_figure(kind, n_tokens, size, font, monkeypatch):
    model = load()
    text = "Two households, both alike in dignity, in fair Verona, where we lay our scene. "
    ids = model.tokenizer.encode(text * 4, bos=True)
    draw, choice = (plot.draw_attention, {"heads": None}) if kind == "heads" else (plot.KINDS[kind], {})
    assert_readable(drawn(draw, size, font, subject=plot.Subject(model, ids[:n_tokens], layer=2, **choice)), monkeypatch)


def assert_readable(figure, monkeypatch):
    """Check the boxes of all texts that are drawn, less the space above and below a line's letters."""
    texts, draw = [], matplotlib.text.Text.draw

    def keep(self, renderer):
        texts.append(self)
        return draw(self, renderer)

    monkeypatch.setattr(matplotlib.text.Text, "draw", keep)
    FigureCanvasAgg(figure).draw()
    pixels = figure.dpi / 72
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [text.get_window_extent().padded(-0.05 * text.get_fontsize() * pixels) for text in texts]
    page, edges = figure.bbox, np.array([box.extents for box in boxes])
    for text, box in zip(texts, boxes, strict=True):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, text
    x0, y0, x1, y1 = edges.T
    apart = (
        (x0[:, None] >= x1) | (x1[:, None] <= x0) | (y0[:, None] >= y1) | (y1[:, None] <= y0) | np.eye(len(boxes), dtype=bool)
    )
    assert apart.all(), [(texts[i].get_text(), texts[j].get_text()) for i, j in np.argwhere(~apart)[:5]]
    assert min(text.get_fontsize() for text in texts) * pixels >= 0.6 * (figure.dpi / 7.2), (
        "text that is far smaller than the font"
    )


def test_a_picture_has_the_pixels_that_are_asked_for(model, tmp_path):
    for size in (SLIDE, (641, 479)):
        plot.plot("mask", subject(model), tmp_path / "a.png", size)
        assert struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24]) == size


def test_text_grows_with_the_picture_and_with_the_font(model):
    def pixels(size, font):
        figure = drawn(plot.draw_mask, size, font, subject=subject(model))
        return figure.axes[0].title.get_fontsize() * figure.dpi / 72

    assert pixels((1280, 720), None) == pytest.approx(14)
    assert pixels((2560, 1440), None) == pytest.approx(28)
    assert pixels((1280, 720), 21) == pytest.approx(21)
    assert pixels(None, 21) == pytest.approx(21)


@pytest.mark.parametrize("heads", [(0,), (1, 2), None])
def test_a_masked_cell_looks_unlike_a_weight_of_zero(heads, model):
    figure = drawn(plot.draw_attention, subject=subject(model, heads=heads))
    maps = [axes for axes in figure.axes if axes.images and np.ma.getmaskarray(axes.images[0].get_array()).any()]
    assert len(maps) == ({1: 2 + 6, 2: 2}[len(heads)] if heads else 6)
    for axes in maps:
        [image] = axes.images
        zero, ground = np.array(image.cmap(image.norm(0.0))), np.array(axes.patch.get_facecolor())
        assert axes.patch.get_hatch()
        if image.get_array().min() >= 0:  # weights; among scores a zero is white, and the hatching alone differs
            assert np.abs(zero - ground)[:3].max() > 0.5


def test_several_heads_are_drawn_in_the_order_asked_for(model):
    given = subject(model, layer=1, heads=(4, 2))
    weights = record(model, given.ids)["layers.1.attention.weights"]
    figure = drawn(plot.draw_attention, subject=given)
    for x, head in zip(images(figure), (4, 2), strict=False):
        assert np.array_equal(x.filled(0), weights[head])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["layer 1, head 4", "layer 1, head 2"]


@pytest.mark.parametrize("kind", ["attention", "mask"])
def test_axes_say_query_position_and_key_position(kind, model):
    axes = drawn(plot.KINDS[kind], subject=subject(model)).axes
    assert axes[0].get_ylabel() == "query position"
    assert axes[0].get_xlabel() == "key position"


def test_a_colour_bar_says_whether_it_is_linear(model):
    found = texts(drawn(plot.draw_attention, subject=subject(model)))
    assert {"score (linear scale)", "weight (square-root scale)"} <= set(found)
    assert "probability (linear scale)" in texts(drawn(plot.draw_logit_lens, subject=subject(model)))


def test_tokens_are_whole_where_there_is_room():
    model = load()
    long = "Constantinopolitan"
    model.__dict__["tokenizer"] = SimpleNamespace(
        vocab_size=9, silent_ids=frozenset(), special_tokens={}, token_bytes=lambda id, opening: long.encode()
    )
    for kind in ("attention", "mask", "tokens", "logit-lens"):
        assert any(long in text for text in texts(drawn(plot.KINDS[kind], subject=plot.Subject(model, [1, 2, 3])))), kind


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.001, "0.001"), (0.5, "0.5"), (20, "20"), (10_000, "10,000"), (1e-6, "10⁻⁶"), (2e-7, "2·10⁻⁷"), (1e12, "10¹²")],
)
def test_ticks_are_numbers_that_people_write(value, text):
    assert figures.written(value) == text


@pytest.mark.parametrize(
    ("least", "most", "ticks"),
    [
        (0.9, 110, ["1", "2", "5", "10", "20", "50", "100"]),
        (2.2, 6.5, ["3", "4", "5", "6"]),
        (1e-8, 2.0, ["10⁻⁸", "10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1"]),
        (1e-24, 1.0, ["10⁻²⁴", "10⁻²²", "10⁻²⁰"]),
    ],
)
def test_ticks_of_a_logarithmic_axis(least, most, ticks):
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(least, most))
    figures.label_decades(axes.yaxis, least, most, room=4)
    found = [text.get_text() for text in axes.yaxis.get_ticklabels()]
    assert found[: len(ticks)] == ticks
    assert len(found) <= 4 / figures.LINE


# ---------------------------------------------------------------------------------------------------------------------- error


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Trace the embedded model in float64, in float32, and with one head's query spoiled in layer 3."""
    folder, model = tmp_path_factory.mktemp("traces"), load()
    tokens = model.tokenizer.encode("ROMEO:", bos=True)
    for name, precision in (("reference", "float64"), ("right", "float32")):
        trace.write_trace(model, tokens, folder / name, precision=Precision(precision))

    def spoil(x):
        y = x.copy()
        y[:, 0] *= -1
        return y

    with trace.new_trace(folder / "wrong") as writer:
        trace.run(model, tokens, tap=trace.patched({"layers.3.attention.q_rope": spoil}, writer))
        writer.describe("a port", tokens, [], Precision("float32"), trace.model_facts(model))
    return folder


@pytest.mark.parametrize("candidate", ["right", "wrong"])
def test_error_shows_a_comparison(candidate, traces):
    comparison = compare(traces / "reference", traces / candidate)
    figure = drawn(plot.draw_error, report=as_dict(comparison))
    names = ["emb.", *map(str, range(load().config.n_layers)), "end"]
    for axes in figure.axes:
        assert [label for _, _, label in between_ticks(axes.xaxis)] == names
    marked = [text.get_text() for text in figure.axes[0].texts]
    assert marked == ([] if comparison.equal else [f"first divergence: {comparison.first.name}"])
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    floor, limit = lines["noise floor"], lines["limit: 32 times the floor"]
    error = lines["error; at the bottom edge: none"]
    rows = [row for row in comparison.rows if row.judged]
    assert np.allclose(floor, [row.judged.floor for row in rows])
    assert np.allclose(limit, 32 * floor)
    nonzero = np.array([row.judged.error for row in rows]) > 0
    assert np.allclose(error[nonzero], [row.judged.error for row in rows if row.judged.error > 0])
    assert len(lines.get("different", ())) == sum(not row.passed for row in rows)  # the legend names it where there are any
    assert ("different" in lines) != comparison.equal
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert len(heights) == load().config.n_layers + 2  # the embedding, the layers, the end
    expected = max(row.judged.ratio for row in rows if row.name.startswith("layers.3."))
    assert heights[1 + 3] == pytest.approx(expected)
    assert (candidate == "right") == comparison.equal


def test_traces_without_any_difference_are_identical(traces):
    comparison = compare(traces / "right", traces / "right")
    assert comparison.equal
    assert comparison.verdict == f"identical: {len(comparison.rows)} activations"
    figure = drawn(plot.draw_error, report=as_dict(comparison))
    assert figure.axes[0].get_title(loc="left") == comparison.verdict
    assert not figure.axes[0].texts


def test_error_at_the_command_line(traces, tmp_path, capsys):
    assert main(["plot", "error", str(traces / "reference"), str(traces / "wrong"), "-o", str(tmp_path / "e.png")]) == 0
    report = tmp_path / "report.json"
    write_report(compare(traces / "reference", traces / "wrong", atol=1e-3), report)  # no floor judges: there is no limit
    assert main(["plot", "error", str(report), "-o", str(tmp_path / "e.svg")]) == 0
    assert main(["plot", "error", "-o", str(tmp_path / "f.png")]) == 2
    assert "expected REFERENCE and CANDIDATE" in capsys.readouterr().err
    report.write_text(json.dumps({"format": "another"}))
    assert main(["plot", "error", str(report), "-o", str(tmp_path / "f.png")]) == 2
    assert "report.json: expected a comparison" in capsys.readouterr().err
    assert not (tmp_path / "f.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.pop("verdict"), "verdict is None"),
        (lambda report: report.update(activations=3), "activations is 3"),
        (lambda report: report.update(limit=float("nan")), "limit is nan"),
        (lambda report: report["activations"].append("x"), "activations["),
        (lambda report: report["activations"][3].update(name=["a"]), "activations[3] is"),
        (lambda report: report["activations"][3]["accumulated"].pop("floor"), "activations[3] is"),
        (lambda report: report["activations"][3]["accumulated"].update(ratio="much"), "activations[3] is"),
        (lambda report: report.update(activations=[]), "the comparison measured no activation"),
    ],
)
def test_a_damaged_report_is_one_line(change, message, traces, tmp_path, capsys):
    report = as_dict(compare(traces / "reference", traces / "wrong"))
    change(report)
    (tmp_path / "x.json").write_text(json.dumps(report))
    assert main(["plot", "error", str(tmp_path / "x.json"), "-o", str(tmp_path / "e.png")]) == 2
    assert f"{tmp_path / 'x.json'}: {message}" in capsys.readouterr().err


def test_error_of_few_activations_and_of_numbers_beyond_any_axis(traces):
    report = as_dict(compare(traces / "reference", traces / "wrong"))
    report["activations"] = report["activations"][:2]
    report["activations"][0]["accumulated"].update(error=1e308, ratio=1e308, floor=5e-324)
    report["limit"] = 10**60  # an integer of JSON, larger than NumPy's
    drawn(plot.draw_error, report=report).savefig(os.devnull, format="png")


def test_error_of_infinite_and_missing_activations(traces):
    report = as_dict(compare(traces / "reference", traces / "wrong"))
    report["activations"][5]["accumulated"].update(error="inf", ratio="inf")
    report["activations"][6]["accumulated"] = None
    drawn(plot.draw_error, report=report).savefig(os.devnull, format="png")
    nothing = [{**entry, "accumulated": None} for entry in report["activations"]]
    with pytest.raises(ValueError, match="measured no activation"):
        drawn(plot.draw_error, report={**report, "activations": nothing})


# --------------------------------------------------------------------------------------------------------------- command line


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_picture_at_the_command_line(tmp_path):
    out = tmp_path / "a.svg"
    assert main(["plot", "attention", "--prompt", "What light", "--layer", "2", "--head", "1", "-o", str(out)]) == 0
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "a.pdf"], "a.pdf: expected a file that ends in .png or .svg"),
        (["--layer", "6", "-o", "a.png"], "layer 6 is not in this model, which has layers 0 to 5"),
        (["--head", "-1", "-o", "a.png"], "head -1 is not in this model"),
        (["-o", "nowhere/a.png"], "a.png: No such file or directory"),
        (["-o", "folder.png"], "folder.png is a folder, expected a file to write"),
        (["trace", "-o", "a.png"], "residual draws a prompt, not trace"),
        (["--head", "1,2", "-o", "a.png"], "residual draws one head, and attention several"),
        (["--head", "all", "-o", "a.png"], "residual draws one head, and attention several"),
        (["--position", "1", "-o", "a.png"], "residual draws all positions, and rope one"),
        (["--size", "20x720", "-o", "a.png"], "a width of 20 pixels: expected 100 to 10000"),
        (["--size", "1280x99999", "-o", "a.png"], "a height of 99999 pixels: expected 100 to 10000"),
        (["--font", "nan", "-o", "a.png"], "a font of nan pixels: expected 4 to 200"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["plot", "residual", *options, "--prompt", "hello"]) == 2
    assert said in one_line(capsys)
    assert os.listdir(tmp_path) == ["folder.png"]


@pytest.mark.parametrize(("option", "value"), [("--size", "big"), ("--size", "1280"), ("--head", "1,two"), ("--head", "")])
def test_an_option_of_another_form_is_refused(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plot", "mask", option, value])
    assert f"argument {option}: expected" in capsys.readouterr().err


def test_a_position_that_the_text_lacks_is_refused(tmp_path, capsys):
    assert main(["plot", "rope", "--tokens", "1,2,3", "--position", "3", "-o", str(tmp_path / "a.png")]) == 2
    assert "position 3 is not in this text, which has positions 0 to 2" in one_line(capsys)


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "mask", "--prompt", "hello", "-o", str(tmp_path / "a.png")]) == 2
    assert "pip install 'npllama[learn]'" in one_line(capsys)


@pytest.mark.parametrize("backend", ["", "agg", "tkagg"])
def test_without_a_display_a_window_is_refused_in_one_line(backend):
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"MPLBACKEND": backend}
    if not backend:
        del environment["MPLBACKEND"]
    command = [sys.executable, "-m", "npllama", "plot", "mask", "--prompt", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no window can be opened" in done.stderr
    assert "-o FILE.png" in done.stderr


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def draw(sheet):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        figures.show(draw, out)
    assert out.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_window_gets_the_picture(monkeypatch):
    from matplotlib import pyplot

    figure = Figure()
    figure.canvas = SimpleNamespace(required_interactive_framework="qt", manager=None)
    shown = []
    monkeypatch.setattr(pyplot, "figure", lambda dpi: figure)
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(figure.axes)))
    monkeypatch.setattr(pyplot, "close", lambda closed: shown.append(closed is figure))
    plot.plot("mask", plot.Subject(load(), [1, 2, 3]), None)
    assert shown == [1, True]
