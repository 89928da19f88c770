"""Every picture comes out at every length, with whatever tokens, and shows the numbers that the taps do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure  # noqa: E402

from npllama import Precision, load, ops, record  # noqa: E402
from npllama.checkpoint import Model  # noqa: E402
from npllama.cli import main  # noqa: E402
from npllama.golden import trace  # noqa: E402
from npllama.golden.compare import compare  # noqa: E402
from npllama.golden.compare.report import as_dict, write_report  # noqa: E402
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


def drawn(draw, **given) -> Figure:
    figure = Figure()
    with matplotlib.rc_context({"text.parse_math": False}):
        draw(figure, **given)
    return figure


def images(figure: Figure) -> list[np.ma.MaskedArray]:
    return [image.get_array() for axes in figure.axes for image in axes.images]


def texts(figure: Figure) -> list[str]:
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found]


@pytest.mark.parametrize("kind", plot.KINDS)
@pytest.mark.parametrize("n_tokens", [1, 17, 200])
def test_every_kind_at_every_length(kind, n_tokens, model, tmp_path):
    """Warnings are errors here: a glyph that no font has would be one."""
    out = tmp_path / f"{kind}.png"
    plot.plot(kind, subject(model, n_tokens, layer=1, head=5), out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == [out.name]


def test_svg_is_the_same_each_time(model, tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.SVG"
    for out in (first, second):
        plot.plot("tokens", subject(model, 5), out)
    assert b"<svg" in first.read_bytes()
    assert first.read_bytes() == second.read_bytes()


def test_attention_shows_what_the_taps_do(model):
    given = subject(model, layer=1, head=4)
    seen = record(model, given.ids)
    scores, weights = seen["layers.1.attention.scores"][4], seen["layers.1.attention.weights"]
    shown = images(drawn(plot.draw_attention, subject=given))
    unmasked, masked, softmax, heads = shown[0], shown[1], shown[2], shown[3:9]
    visible = ~np.isneginf(scores)
    assert np.array_equal(unmasked[visible], scores[visible])
    assert np.isfinite(unmasked).all(), "the first map is from before the mask"
    assert np.array_equal(np.ma.getmaskarray(masked), ~visible)
    assert np.array_equal(masked.compressed(), scores[visible])
    assert np.array_equal(softmax, weights[4])
    assert np.array_equal(np.stack(heads), weights)
    assert texts(drawn(plot.draw_attention, subject=given)).count("−∞") == 17 * 16 / 2


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
    lines = drawn(plot.draw_residual, subject=given).axes[0].lines
    assert np.array_equal(np.stack([line.get_ydata() for line in lines[:17]], axis=1), norms)
    assert lines[-1].get_label().startswith(f"largest at the end: position {norms[-1].argmax()}, ")


@pytest.mark.parametrize("n_tokens", [17, 60])
def test_logit_lens_shows_every_layer_and_position_once(n_tokens):
    config = CONFIGS["odd_ffn"]
    given = subject(Model(config, random_params(config, seed=1)), n_tokens)
    ids, p = logit_lens(given.model, record(given.model, given.ids), 1)
    figure = drawn(plot.draw_logit_lens, subject=given)
    assert np.array_equal(np.concatenate(images(figure)[:-1] if len(images(figure)) > 3 else images(figure), axis=1), p[..., 0])
    cells = [text for axes in figure.axes for text in axes.texts]
    strips = [axes for axes in figure.axes if axes.texts]
    found = np.full(ids.shape[:2], -1)
    start = 0
    for axes in strips:
        for text in axes.texts:
            column, row = text.get_position()
            found[row, start + column] = int(text.get_text())
        start += 25
    assert len(cells) == ids.shape[0] * n_tokens
    assert np.array_equal(found, ids[..., 0])


def test_rope_says_how_far_each_pair_turns(model):
    given = subject(model, 9, layer=1, head=2)
    frequencies = ops.rope_frequencies(model.config.head_dim, model.config.rope_theta, model.config.rope_scaling, np.float64)
    figure = drawn(plot.draw_rope, subject=given)
    turns = [axes.get_title() for axes in figure.axes[: model.config.head_dim // 2]]
    expected = [f"pair {j}: {round(np.degrees(8 * frequency)) % 360}°" for j, frequency in enumerate(frequencies)]
    assert turns == expected
    unscaled, scaled = (line.get_ydata() for line in figure.axes[-1].lines[:2])
    assert np.array_equal(scaled, frequencies)
    assert [line.get_xdata().tolist() for line in figure.axes[-1].lines[:2]] == [list(range(len(frequencies)))] * 2
    assert any(text.startswith("RoPE rotates the query at position 8 (") for text in texts(figure))
    assert (unscaled >= scaled).all()
    assert unscaled[-1] == pytest.approx(8 * scaled[-1])  # Llama 3.1's factor


def test_tokens_are_all_there_with_their_ids(model):
    given = subject(model, 60)
    shown = [text.get_text() for text in drawn(plot.draw_tokens, subject=given).axes[0].texts]
    assert shown[1::2] == [str(id) for id in given.ids]
    assert set(shown[0::2]) >= {"␣", "↵", "⇥", "$x$"}


def test_where_no_font_has_a_glyph_its_code_is_shown(monkeypatch):
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    plot.fonts_for.cache_clear()
    with matplotlib.rc_context():
        assert plot.drawable(["你好", " é"]) == ["<U+4F60><U+597D>", " é"]
    plot.fonts_for.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------- error


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The embedded model in float64, in float32, and with one head's query spoiled in layer 3."""
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
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    floor, limit = lines["noise floor"], lines["limit: 32 times the floor"]
    error = lines["error; at the bottom edge: none"]
    rows = [row for row in comparison.rows if row.judged]
    assert np.allclose(floor, [row.judged.floor for row in rows])
    assert np.allclose(limit, 32 * floor)
    nonzero = np.array([row.judged.error for row in rows]) > 0
    assert np.allclose(error[nonzero], [row.judged.error for row in rows if row.judged.error > 0])
    assert len(lines["different"]) == sum(not row.passed for row in rows)
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert len(heights) == load().config.n_layers + 2  # the embedding, the layers, the end
    expected = max(row.judged.ratio for row in rows if row.name.startswith("layers.3."))
    assert heights[1 + 3] == pytest.approx(expected)
    assert (candidate == "right") == comparison.equal


def test_traces_without_any_difference_are_identical(traces):
    comparison = compare(traces / "right", traces / "right")
    assert comparison.equal
    assert comparison.verdict == f"identical: {len(comparison.rows)} activations"
    assert comparison.verdict in texts(drawn(plot.draw_error, report=as_dict(comparison)))


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
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["plot", "residual", *options, "--prompt", "hello"]) == 2
    assert said in one_line(capsys)
    assert os.listdir(tmp_path) == ["folder.png"]


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

    def draw(figure):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plot.show(draw, out)
    assert out.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_window_gets_the_picture(monkeypatch):
    from matplotlib import pyplot

    figure = Figure()
    figure.canvas = SimpleNamespace(required_interactive_framework="qt", manager=None)
    shown = []
    monkeypatch.setattr(pyplot, "figure", lambda: figure)
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(figure.axes)))
    monkeypatch.setattr(pyplot, "close", lambda closed: shown.append(closed is figure))
    plot.plot("mask", plot.Subject(load(), [1, 2, 3]), None)
    assert shown == [1, True]
