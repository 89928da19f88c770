"""Check that the page's data is the trace's, whatever the prompt; test_explain_browser.py opens the page."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys

import numpy as np
import pytest

from npllama import load, record
from npllama.activations import TABLE, activation_shapes
from npllama.cli import main
from npllama.learn.explain import explain, packed, page_data, prompt_text, quoted, steps, unpacked
from npllama.learn.lens import logit_lens, residual_names, visible

from hostile import HOSTILE, hostile_model

MILLION = 1_000_000


def array(text: str, dtype: str, *shape: int) -> np.ndarray:
    return unpacked(text, dtype).reshape(shape)


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_the_data_is_the_trace(n_tokens, model):
    ids, config = model.tokenizer.encode("What light through yonder window breaks", bos=True)[:n_tokens], model.config
    L, H, T = config.n_layers, config.n_heads, n_tokens
    recording, data = record(model, ids), page_data(model, ids)
    weights = array(data["weights"], "<u2", L, H, T * (T + 1) // 2) / 65535
    for layer in range(L):
        for t in range(T):
            row = weights[layer, :, t * (t + 1) // 2 :][:, : t + 1]
            expected = recording[f"layers.{layer}.attention.weights"][:, t]
            assert np.abs(row - expected[:, : t + 1]).max() <= 0.5 / 65535 + 1e-9
            assert not expected[:, t + 1 :].any(), "what is left out is zero"
    norms = array(data["norms"], "<f4", 1 + 2 * L, T)
    assert data["norm_names"] == residual_names(config)
    for row, name in zip(norms, data["norm_names"], strict=True):
        assert np.allclose(row, np.linalg.norm(recording[name].astype(np.float64), axis=-1), rtol=1e-5)
    ids_, p = logit_lens(model, recording, 5)
    assert np.array_equal(array(data["lens_ids"], "<i4", L + 1, T, 5), ids_)
    assert np.array_equal(array(data["lens"], "<f4", L + 1, T, 5), p)
    last = recording["logits"][-1]
    order = np.argsort(-last, kind="stable")
    assert np.array_equal(array(data["logits"], "<f4", config.vocab_size), last[order])
    assert [candidate["id"] for candidate in data["candidates"]] == order[:20].tolist()
    assert list(data["numbers"]) == list(TABLE)
    for name, n_heads in (("q_rope", H), ("k", config.n_kv_heads), ("heads", H)):
        numbers = array(data["numbers"][f"attention.{name}"], "<f4", L, T, n_heads, 4)
        assert np.array_equal(numbers[2], recording[f"layers.2.attention.{name}"][..., :4])
    weights = array(data["numbers"]["attention.weights"], "<f4", L, T, H, min(T, 4))
    assert np.array_equal(weights[2], recording["layers.2.attention.weights"].swapaxes(0, 1)[..., :4])
    assert np.array_equal(array(data["numbers"]["out"], "<f4", L, T, 4)[3], recording["layers.3.out"][:, :4])
    assert np.array_equal(array(data["numbers"]["norm"], "<f4", 1, T, 4)[0], recording["norm"][:, :4])


def test_arrays_are_unpacked_to_the_bit():
    for dtype, numbers in (("<f4", [0.1, -np.inf, 1e-42, -0.0]), ("<u2", [0, 1, 65535]), ("<i4", [-2, 10**6]), ("<f4", [])):
        x = np.array(numbers, dtype)
        assert unpacked(packed(x, dtype), dtype).tobytes() == x.tobytes()


def test_the_prompt_is_text_without_special_tokens(model):
    ids = model.tokenizer.encode("What light\nthrough", bos=True)
    assert prompt_text(model.tokenizer, ids) == "What light through"
    assert prompt_text(model.tokenizer, ids[:1]) == f"tokens {ids[0]}"
    assert prompt_text(None, [3, 1]) == "tokens 3, 1"


def test_every_activation_has_its_step_with_shape_line_and_code(model):
    data, config = page_data(model, [1, 2, 3]), model.config
    assert [step["kind"] for step in data["steps"]] == list(TABLE)
    shapes = {name.removeprefix("layers.0."): list(shape) for name, shape in activation_shapes(config, 3).items()}
    source = os.path.join(os.path.dirname(sys.modules["npllama"].__file__), "")
    for step in data["steps"]:
        assert json.loads(step["shape"].split(" = ")[1]) == shapes[step["kind"]]
        for where, expected in [
            (step["call"]["where"], step["call"]["line"]),
            *((code["where"], code["source"].splitlines()[0]) for code in step["code"]),
        ]:
            file, line = re.match(r"npllama/([\w/]+\.py):(\d+)", where).groups()
            with open(source + file, encoding="utf-8") as lines:
                assert lines.read().splitlines()[int(line) - 1].strip() == expected.strip()
    assert {step["kind"] for step in data["steps"]} == {
        name.removeprefix("layers.0.") for name in shapes if "layers" not in name
    }


def test_the_output_matrix_has_the_embedding_s_letter_where_it_is_the_embedding(model):
    formulas = {}
    for tied in (True, False):
        steps_ = steps(dataclasses.replace(model.config, tied_embeddings=tied), 3)
        formulas[tied] = [step["formula"] for step in steps_]
        assert formulas[tied][0] == "x = E[id]"
    assert (formulas[True][-1], formulas[False][-1]) == ("logits = y Eᵀ", "logits = y Outputᵀ")


def test_a_hostile_prompt_ends_no_script(tmp_path):
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    out = tmp_path / "page.html"
    size = explain(hostile_model(), [1, 2], out)
    page = out.read_text(encoding="utf-8")
    assert len(page.encode()) == size < 5 * MILLION
    assert len(re.findall("</script", page, re.IGNORECASE)) == 4
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["labels"] == [quoted(visible(HOSTILE))] * 2
    title = re.search("<title>(.*?)</title>", page)[1]
    assert "<" not in title
    shell = re.sub(r"<(script|title|h1).*?</\1>", "", page, flags=re.DOTALL)
    assert "{{" not in shell, "no part of the template is left unfilled"
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))


def test_72_tokens_of_smollm2_are_at_most_5_mb(smollm2, tmp_path):
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    model = load(smollm2)
    ids = model.tokenizer.encode("The quick brown fox jumps over the lazy dog, and the hen, too. " * 6)[:72]
    assert len(ids) == 72
    assert explain(model, ids, tmp_path / "page.html") <= 5 * MILLION


def test_the_command_says_where_and_how_large(tmp_path, capsys):
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    out = tmp_path / "page.html"
    assert main(["explain", "To be", "-o", str(out)]) == 0
    assert re.fullmatch(rf"{re.escape(str(out))}: [\d.]+ MB\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["hello", "--tokens", "1,2"], "expected a prompt, or --tokens instead of it"),
        (["--tokens", "99999"], "token id 99999 is outside the vocabulary"),
        (["hello", "-m", "nowhere/model"], "nowhere/model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options, said, tmp_path, capsys):
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    assert main(["explain", *options, "-o", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_without_bokeh_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    monkeypatch.setitem(sys.modules, "bokeh.resources", None)
    assert main(["explain", "hello", "-o", str(tmp_path / "page.html")]) == 2
    assert "pip install 'npllama[learn]'" in capsys.readouterr().err
