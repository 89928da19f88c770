"""Golden bundles: right, measured, reproducible, and usable without npllama."""

from __future__ import annotations

import json
import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from npllama import load
from npllama.checkpoint import demo_path, sha256
from npllama.golden.bundle import write_golden
from npllama.golden.precision import Precision
from npllama.golden.trace import Selection, TraceError, read_trace, record

import tiny
from system import ROOT

CONFIG = tiny.CONFIGS["grouped"]
MODEL = SimpleNamespace(config=CONFIG, params=tiny.random_params(CONFIG, seed=1), path="/somewhere/model")
TOKENS = tiny.random_tokens(CONFIG, seed=2, shape=12).tolist()


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return write_golden(MODEL, TOKENS, tmp_path_factory.mktemp("golden") / "g", steps=[7, 8])


def test_a_bundle_is_the_float64_pass(golden):
    exact = record(MODEL, TOKENS, steps=[7, 8], precision=Precision("float64"))
    assert list(golden) == list(exact)
    for name, x in exact.items():
        if name.endswith("logits"):
            assert golden[name].dtype == np.float64
            np.testing.assert_array_equal(golden[name], x)
        else:
            assert golden[name].dtype == np.float32
            np.testing.assert_array_equal(golden[name], x.astype(np.float32))
    assert golden.meta["precision"] == "float64"
    assert golden.meta["model"]["path"] is None
    assert all(golden.hash_matches(name) for name in golden)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_noise_floor_is_the_difference_of_that_precision(golden, name):
    exact = record(MODEL, TOKENS, steps=[7, 8], precision=Precision("float64"))
    rounded = record(MODEL, TOKENS, steps=[7, 8], precision=Precision(name))
    for key, x in exact.items():
        kept = np.isfinite(x)
        difference = np.abs(rounded[key][kept] - x[kept])
        found = golden.meta["activations"][key]["noise"][name]
        assert found["max"] == difference.max(), key
        assert found["rms"] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-9), key


def test_bfloat16_is_noisier_than_float32_and_both_are_small(golden):
    for name, entry in golden.meta["activations"].items():
        relative = {key: noise["rms"] / entry["rms"] for key, noise in entry["noise"].items()}
        if "tok_embeddings" in name:
            assert relative["float32"] == 0
        else:
            assert 0 < relative["float32"] < 2e-6, name
            assert 1e-3 < relative["bfloat16"] < 3e-2, name


def test_a_fresh_run_reproduces_a_bundle(golden, tmp_path):
    again = write_golden(MODEL, TOKENS, tmp_path / "again", steps=[7, 8])
    assert again.meta == golden.meta


def test_every_number_is_readable_with_a_fixed_offset_as_the_readme_says(golden):
    readme = (golden.path / "README.md").read_text()
    assert "fseek(f, 128, SEEK_SET)" in readme
    for name, entry in golden.meta["activations"].items():
        content = (golden.path / entry["file"]).read_bytes()
        assert 10 + struct.unpack_from("<H", content, 8)[0] == 128, name
        assert b"'fortran_order': False" in content[:128]
        bare = np.frombuffer(content[128:], "<f8" if name.endswith("logits") else "<f4")
        np.testing.assert_array_equal(bare.reshape(entry["shape"]), golden[name])


def test_the_readme_names_the_tokens_the_model_and_every_activation(golden):
    readme = (golden.path / "README.md").read_text()
    assert json.dumps(TOKENS) in readme
    assert "[[7], [8]]" in readme
    assert "n_kv_heads = 2" in readme
    kinds = {re.sub(r"(step\.\d+/)?(layers\.\d+\.)?", "", name) for name in golden}
    table = readme[readme.index("| file |") : readme.index("If your queries")].replace("layers.N.", "")
    named = set()
    for row in table.strip().splitlines()[2:]:
        first, *others = row.split("|")[1].strip().split(", ")
        named |= {first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)}
    assert named == kinds


def test_the_readmes_rule_tells_rounding_from_an_error(golden):
    """Check that another summation order stays near 1 and that the wrong eps is far above, from the first norm on."""

    def ratios(config):
        model = SimpleNamespace(config=config, params=MODEL.params)
        mine = record(model, TOKENS)
        found = {}
        for name, x in mine.items():
            kept = np.isfinite(golden[name])
            rms = np.sqrt(np.mean((x[kept].astype(np.float64) - golden[name][kept]) ** 2))
            found[name] = rms / (golden.meta["activations"][name]["noise"]["float32"]["rms"] or np.inf)
        return found

    assert max(ratios(CONFIG).values()) < 3
    wrong = ratios(tiny.config(norm_eps=1e-3))
    assert next(name for name, ratio in wrong.items() if ratio > 10) == "layers.0.attention_norm"


def test_the_embedded_models_shape_fits_two_megabytes(tmp_path):
    config = tiny.config(dim=192, n_layers=6, n_heads=6, n_kv_heads=2, head_dim=32, ffn_dim=512, vocab_size=2256)
    model = SimpleNamespace(config=config, params=tiny.random_params(config, seed=1))
    lines = []
    write_golden(model, tiny.random_tokens(config, 2, 12), tmp_path / "g", report=lines.append)
    total = sum(file.stat().st_size for file in (tmp_path / "g").rglob("*") if file.is_file())
    assert total < 2_000_000
    assert lines == [f"105 activations, 1.3 MB, to {tmp_path / 'g'}"]


def test_a_choice_always_keeps_the_logits(tmp_path):
    trace = write_golden(MODEL, TOKENS, tmp_path / "g", selection=Selection(taps=("*.q_rope",), layers=(1,)))
    assert list(trace) == ["layers.1.attention.q_rope", "logits"]
    with pytest.raises(TraceError, match="no activation fits"):
        write_golden(MODEL, TOKENS, tmp_path / "other", selection=Selection(taps=("nothing",)))


def test_force_replaces_a_bundle_readme_and_all(tmp_path):
    write_golden(MODEL, [1], tmp_path / "g")
    with pytest.raises(ValueError, match="g exists"):
        write_golden(MODEL, [2], tmp_path / "g")
    write_golden(MODEL, [2], tmp_path / "g", force=True)
    assert read_trace(tmp_path / "g").meta["tokens"] == [2]
    (tmp_path / "g" / ".notes").write_text("mine")
    with pytest.raises(ValueError, match=r"g is not replaced: it holds \.notes"):
        write_golden(MODEL, [1], tmp_path / "g", force=True)
    assert (tmp_path / "g" / ".notes").read_text() == "mine"


# ------------------------------------------------------------------------------------------------- the embedded model's bundle

BUNDLE = ROOT / "tests" / "goldens" / "demo-bundle"


def test_a_fresh_run_reproduces_the_embedded_models_bundle(tmp_path):
    if not BUNDLE.is_dir():
        pytest.skip(f"no bundle was made yet: npllama golden --prompt TEXT --steps 1 --out {BUNDLE.relative_to(ROOT)}")
    shipped = read_trace(BUNDLE)
    assert shipped.meta["model"]["manifest_sha256"] == sha256(demo_path() / "manifest.json"), "the bundle is of another model"
    assert all(shipped.hash_matches(name) for name in shipped)
    assert sum(file.stat().st_size for file in BUNDLE.rglob("*") if file.is_file()) <= 2_000_000
    fresh = write_golden(load(), shipped.meta["tokens"], tmp_path / "g", steps=shipped.meta["steps"])
    assert list(fresh) == list(shipped)
    for name, x in fresh.items():
        finite = np.isfinite(x)
        np.testing.assert_array_equal(np.isfinite(shipped[name]), finite)
        tolerance = 1e-12 if name.endswith("logits") else 1e-7
        assert tiny.relative_error(shipped[name][finite], x[finite]) < tolerance, name
        for precision, noise in shipped.meta["activations"][name]["noise"].items():
            now = fresh.meta["activations"][name]["noise"][precision]["rms"]
            # Another processor's BLAS sums in another order, which changes float32's noise up to threefold.
            assert noise["rms"] / 4 <= now <= 4 * noise["rms"], name


def test_a_bundle_may_bring_the_weights_in_float32(tmp_path):
    params = {name: x.astype(np.float16) if x.ndim == 2 else x for name, x in MODEL.params.items()}
    model = SimpleNamespace(config=CONFIG, params=params, path=None)
    golden = write_golden(model, TOKENS, tmp_path / "g", weights=True)
    assert set(golden.meta["weights"]) == set(params)
    for name, entry in golden.meta["weights"].items():
        x = np.load(tmp_path / "g" / entry["file"])
        assert (x.dtype, x.shape, sha256(tmp_path / "g" / entry["file"])) == (
            np.float32,
            tuple(entry["shape"]),
            entry["sha256"],
        )
        np.testing.assert_array_equal(x, params[name].astype(np.float32))
    assert "`weights/`" in (tmp_path / "g" / "README.md").read_text()
    write_golden(model, TOKENS, tmp_path / "g", force=True)  # they are its own files
    assert not (tmp_path / "g" / "weights").exists()
    assert "weights" not in read_trace(tmp_path / "g").meta
    assert "`weights/`" not in (tmp_path / "g" / "README.md").read_text()
