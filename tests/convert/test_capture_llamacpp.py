"""Check that llama.cpp's activations equal npllama's of the same name, judged by the profile of its rounding."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from npllama import load
from npllama.cli import main
from npllama.golden.compare import compare
from npllama.golden.mistakes import Port
from npllama.golden.precision import Precision, profile
from npllama.golden.trace import Selection, TraceError, read_trace, write_trace

import tiny
from commands import fails

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("xllamacpp is not installed", allow_module_level=True)
pytest.importorskip("gguf", reason="gguf is not installed")

from npllama_convert import llamacpp

from conversions import convert
from foreign import write_gguf

CONFIG = tiny.config(n_layers=1, dim=128, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=128, rope_theta=500000.0)
TOKENS = tiny.random_tokens(CONFIG, 2, 12)
STEPS = [5, 99]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a GGUF file of a kind, the model directory that it becomes, and its float64 trace: once each."""
    folder, done = tmp_path_factory.mktemp("gguf"), {}

    def make(kind):
        if kind not in done:
            params = tiny.random_params(CONFIG, 3)
            file = write_gguf(folder / f"{kind}.gguf", CONFIG, params, kind, tokenizer__ggml__model="no_vocab")
            convert(file, folder / kind)
            write_trace(load(folder / kind), TOKENS, folder / f"{kind}-reference", STEPS, Precision("float64"))
            done[kind] = file, folder / f"{kind}-reference"
        return done[kind]

    return make


def worst_operation(found):
    return max(row.local.ratio for row in found.rows if row.local)


@pytest.mark.parametrize(
    ("kind", "flash_attention", "cache", "rounded"),
    [
        ("F32", "off", "f32", "float32"),
        ("F32", "on", "f32", "float16-cache"),
        ("BF16", "off", "f32", "bfloat16-activations"),
        ("Q8_0", "off", "f16", "int8-activations+float16-cache"),
        ("Q4_1", "off", "f32", "int8-activations-sums"),
        ("Q5_1", "off", "f16", "int8-activations-sums+float16-cache"),
    ],
)
def test_llama_cpp_is_right_by_the_profile_that_it_is_recorded_with(kind, flash_attention, cache, rounded, made, tmp_path):
    """Check every kind of weights, prompt and decode steps; judged as plain float32, the rounding is a difference."""
    file, reference = made(kind)
    options = {"flash_attention": flash_attention, "cache": cache}
    captured = llamacpp.capture(file, TOKENS, tmp_path / "theirs", STEPS, **options)
    assert captured.meta["profile"] == rounded
    assert captured.meta["runtime"].items() >= {**options, "weights": [kind.lower()]}.items()
    unseen = {"attention.scores", "attention.weights"} if flash_attention == "on" else set()
    assert {name for name in read_trace(reference) if name not in captured} == {
        name for name in read_trace(reference) if name.partition("layers.")[2][2:] in unseen
    }
    found = compare(reference, tmp_path / "theirs", partial=bool(unseen))
    assert found.equal, found.verdict
    assert found.wrong_by_themselves == []
    assert found.noise.title == rounded
    if rounded.startswith("int8-activations-sums"):
        without = rounded.replace("-sums", "")
        ignored = compare(reference, tmp_path / "theirs", profile=without)
        assert worst_operation(found) < 4 < 6 < worst_operation(ignored), "whose sums are not rounded"
    if kind == "Q8_0":
        assert not compare(reference, tmp_path / "theirs", partial=True, precision="float32").equal


@pytest.mark.parametrize("mistake", ["half_split", "bfloat16_weights", "no_silu"])
def test_a_wrong_quantised_run_is_told_from_a_right_one(mistake, made, tmp_path):
    """Check that a mistake on top of llama.cpp's rounding is named at its operation."""
    file, reference = made("Q8_0")
    model = load(file.parent / "Q8_0")
    rounded = profile("int8-activations+float16-cache")
    write_trace(model, TOKENS, tmp_path / "mine", STEPS, Port(mistake, computed=rounded))
    found = compare(reference, tmp_path / "mine", profile=rounded.profile)
    assert not found.equal
    where = {"half_split": "attention.q_rope", "bfloat16_weights": "attention.q", "no_silu": "feed_forward.act"}
    assert found.first.name == f"layers.0.{where[mistake]}", found.verdict
    write_trace(model, TOKENS, tmp_path / "right", STEPS, rounded)
    assert compare(reference, tmp_path / "right").equal  # trace.json says how it rounds


def test_a_trace_of_our_own_rounds_as_its_profile_says(made, tmp_path, capsys):
    """Use the weights as they are stored, whose offsets llama.cpp multiplies by rounded sums."""
    _, reference = made("Q4_1")
    ids, steps = (",".join(map(str, numbers)) for numbers in (TOKENS, STEPS))
    options = ["--tokens", ids, "--step-tokens", steps, "--profile", "int8-activations-sums"]
    assert main(["trace", "-m", str(reference.parent / "Q4_1"), *options, "--out", str(tmp_path / "mine")]) == 0
    found = compare(reference, tmp_path / "mine")
    assert found.equal, found.verdict
    assert found.noise.title == "int8-activations-sums"
    made("F32")
    assert main(["trace", "-m", str(reference.parent / "F32"), *options, "--out", str(tmp_path / "other")]) == 2
    assert "rounds the inputs of Q4_1 and Q5_1 weights: found no such weights" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_steps_may_be_greedy_and_a_part_selected(made, tmp_path):
    file, _ = made("F32")
    captured = llamacpp.capture(file, TOKENS, tmp_path / "t", 3, Selection(("*.q", "*.q_rope", "*.scores"), (0,)), "raw")
    assert len(captured.meta["steps"]) == 3
    kinds = ["q", "q_rope", "scores"]
    assert list(captured) == [
        f"{step}layers.0.attention.{kind}" for step in ("", "step.0/", "step.1/", "step.2/") for kind in kinds
    ]
    model = load(file.parent / "F32")
    ours = write_trace(model, TOKENS, tmp_path / "ours", 3)
    assert captured.meta["steps"] == ours.meta["steps"]
    assert captured.meta["activations"]["layers.0.attention.scores"]["made"] == "kq / sqrt(K) + mask"


def test_the_command(made, tmp_path, capsys):
    file, reference = made("F32")
    steps = ",".join(map(str, STEPS))
    ids = ",".join(map(str, TOKENS))
    arguments = ["capture", str(file), "--tokens", ids, "--step-tokens", steps, "--cache", "f16", "--out", str(tmp_path / "t")]
    assert main(arguments) == 0
    assert "up to 60 activations" in capsys.readouterr().err
    assert main(["compare", str(reference), str(tmp_path / "t")]) == 0
    assert "8 times, one operation by 32 times, the noise floor of float16-cache" in capsys.readouterr().out
    out = tmp_path / "x"
    line = fails(capsys, "capture", file, "--tokens", "1", "--dtype", "float16", "--out", out)
    assert line.endswith(f"--dtype is for torch: llama.cpp computes {file} in the precision of its stored weights")
    line = fails(capsys, "capture", tmp_path, "--tokens", "1", "--cache", "f16", "--out", out)
    assert line.endswith(f"--flash-attention and --cache are for llama.cpp: {tmp_path} is not a .gguf file")
    line = fails(capsys, "capture", file, "--tokens", "1,2", "3", "--out", out)
    assert "one sequence at a time" in line
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-1000])
    assert "cut off?" in fails(capsys, "capture", tmp_path / "cut.gguf", "--tokens", "1", "--out", out)
    assert not out.exists()


def test_a_version_that_is_not_known_is_refused_by_name(made, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2027.1.1")
    with pytest.raises(TraceError, match=r"xllamacpp is 2027.1.1, whose C structures are not known here: expected 2026\.9"):
        llamacpp.capture(made("F32")[0], TOKENS, tmp_path / "t")


def test_an_error_in_the_callback_is_raised_and_nothing_is_left(made, tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "NUMBERS", {})
    with pytest.raises(TraceError, match="tok_embeddings is of the type f32, expected f32 or f16"):
        llamacpp.capture(made("F32")[0], TOKENS, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_is_none_in_a_trace_is_refused(made, tmp_path):
    _, reference = made("F32")
    meta = json.loads((reference / "trace.json").read_text())
    write_trace(load(reference.parent / "F32"), TOKENS, tmp_path / "t", STEPS)
    mine = json.loads((tmp_path / "t" / "trace.json").read_text())
    (tmp_path / "t" / "trace.json").write_text(json.dumps({**mine, "profile": "int3"}))
    with pytest.raises(ValueError, match=r"trace.json: profile is 'int3', expected one such as"):
        compare(reference, tmp_path / "t")
    assert meta.get("profile") is None
    with pytest.raises(ValueError, match="precision is float32 and rounding profile float16-cache: expected one of them"):
        compare(reference, reference, precision="float32", profile="float16-cache")
    assert np.isfinite(read_trace(reference)["logits"]).all()
