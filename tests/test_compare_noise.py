"""The threshold is measured: right programs that round otherwise stay well below it, and floors are what they say."""

from __future__ import annotations

import json

import broken_ports
import numpy as np
import pytest

from npllama import model as model_module
from npllama.checkpoint import Model
from npllama.compare import compare
from npllama.compare.noise import DEFAULTS, LIMITS, measure_noise
from npllama.golden import write_golden
from npllama.precision import Precision
from npllama.trace import record, write_trace

import tiny

F4 = np.float32


def plain_sum(terms):
    """Float32 numbers added one after the other, along the first axis, as a loop in C does."""
    total = np.zeros(terms.shape[1:], F4)
    for term in terms:
        total = total + term
    return total


def loop_linear(x, weight):
    rows = x.reshape(-1, x.shape[-1])
    total = np.zeros((len(rows), len(weight)), F4)
    for i in range(rows.shape[1]):
        total += rows[:, i, None] * weight[None, :, i]
    return total.reshape(*x.shape[:-1], len(weight))


def backward_linear(x, weight):
    return loop_linear(x[..., ::-1], weight[:, ::-1])


def loop_norm(x, weight, eps):
    return weight * (x * (F4(1) / np.sqrt(plain_sum(np.moveaxis(x * x, -1, 0)) / F4(x.shape[-1]) + F4(eps)))[..., None])


def loop_scores(q, keys, mask):
    k = np.repeat(keys, q.shape[-2] // keys.shape[-3], axis=-3)
    q = (q * F4(q.shape[-1] ** -0.5)).swapaxes(-2, -3)
    return plain_sum(np.stack([q[..., :, None, i] * k[..., None, :, i] for i in range(q.shape[-1])])) + mask


def loop_softmax(x):
    y = np.exp(x - x.max(-1, keepdims=True))
    return y * (F4(1) / plain_sum(np.moveaxis(y, -1, 0)))[..., None]


def loop_heads(weights, values):
    v = np.repeat(values, weights.shape[-3] // values.shape[-3], axis=-3)
    return plain_sum(np.stack([weights[..., s, None] * v[..., None, s, :] for s in range(v.shape[-2])])).swapaxes(-2, -3)


LOOPS = {
    "rms_norm": loop_norm,
    "attention_scores": loop_scores,
    "softmax": loop_softmax,
    "attention_heads": loop_heads,
    "swiglu": lambda gate, up: gate * (F4(1) / (F4(1) + np.exp(-gate))) * up,
}


def worst(comparison):
    """The largest ratios, accumulated and local."""
    return [max(getattr(row, which).ratio for row in comparison.rows) for which in ("judged", "local")]


@pytest.mark.parametrize("linear", [loop_linear, backward_linear])
@pytest.mark.parametrize("name", ["grouped", "one_kv_head", "wide_heads", "llama3.1"])
def test_plain_loops_are_well_within_the_limit(name, linear, tmp_path, monkeypatch, record_property):
    config = tiny.CONFIGS[name]
    model = Model(config, tiny.random_params(config, 1))
    tokens = tiny.random_tokens(config, 2, 24)
    reference = write_trace(model, tokens, tmp_path / "reference", 0, Precision("float64")).path
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "linear", linear)
        np.savez(tmp_path / "mine.npz", **record(model, tokens, precision=broken_ports.Port(**LOOPS)))
    found = compare(reference, tmp_path / "mine.npz", model=model)
    accumulated, local = worst(found)
    record_property("ratios", (accumulated, local))
    print(f"{name}: {accumulated:.1f} accumulated, {local:.1f} local, of {found.noise.limit:g}")
    assert accumulated < LIMITS["float32"] / 2
    assert local < LIMITS["float32"] / 2
    assert compare(reference, tmp_path / "mine.npz").equal, "the default floor lets it pass as well"


@pytest.mark.parametrize("name", ["grouped", "llama3.2"])
def test_torch_is_well_within_the_limit(name, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from hf_reference import hf_model, hf_module_outputs

    config = tiny.CONFIGS[name]
    model = Model(config, tiny.random_params(config, 1))
    tokens = tiny.random_tokens(config, 2, 24)
    reference = write_trace(model, tokens, tmp_path / "reference", 0, Precision("float64")).path
    np.savez(tmp_path / "theirs.npz", **hf_module_outputs(hf_model(config, model.params), tokens))
    accumulated, local = worst(compare(reference, tmp_path / "theirs.npz", names="hf", model=model))
    print(f"{name}: {accumulated:.1f} accumulated, {local:.1f} local")
    assert max(accumulated, local) < LIMITS["float32"] / 2


@pytest.mark.parametrize(("mine", "judge"), [("hf", "meta"), ("meta", "hf")])
def test_the_other_convention_of_bfloat16_is_within_the_limit(mine, judge, tmp_path):
    config = tiny.CONFIGS["grouped"]
    model = Model(config, tiny.random_params(config, 1))
    tokens = tiny.random_tokens(config, 2, 24)
    reference = write_trace(model, tokens, tmp_path / "reference", 0, Precision("float64")).path
    path = write_trace(model, tokens, tmp_path / "mine", 0, Precision("bfloat16", mine)).path
    names = set(record(model, tokens))
    noise = measure_noise(model, tokens, [], "bfloat16", judge, names)
    found = compare(reference, path, model=model, noise=noise)
    accumulated, local = worst(found)
    print(f"{mine} by {judge}: {accumulated:.1f} accumulated, {local:.1f} local")
    assert max(accumulated, local) < LIMITS["bfloat16"] / 1.5


def test_the_floor_is_the_difference_of_the_two_passes():
    """Against a calculation written out: npllama's own float32 differs only in how norms and softmax sum."""
    model = broken_ports.tiny_model()
    tokens = tiny.random_tokens(model.config, 2, 8)
    noise = measure_noise(model, tokens, [], "bfloat16", "meta", {"layers.1.out", "layers.0.attention.scores"})
    exact, rounded = (record(model, tokens, precision=Precision(name)) for name in ("float64", "bfloat16"))
    d = rounded["layers.1.out"] - exact["layers.1.out"]
    np.testing.assert_allclose(noise.accumulated["layers.1.out"].rms, np.sqrt((d**2).mean(-1)), rtol=1e-12)
    np.testing.assert_allclose(noise.accumulated["layers.1.out"].max, np.abs(d).max(-1), rtol=1e-12)
    name = "layers.0.attention.scores"
    for t in range(8):
        seen = rounded[name][:, t, : t + 1] - exact[name][:, t, : t + 1]
        assert noise.accumulated[name].rms[t] == pytest.approx(np.sqrt((seen**2).mean()), rel=1e-12)


def test_a_floor_is_never_below_the_median_or_one_rounding():
    noise = measure_noise(*_model_and_tokens(), [], "float32", None, {"tok_embeddings", "norm"})
    from npllama.compare.noise import Norms

    size, kept = Norms(np.full(8, 2.0), np.full(8, 5.0)), np.ones(8, bool)
    embeddings = noise.floor("tok_embeddings", size, kept)
    assert (embeddings.rms == 2.0 * 2.0**-24).all(), "nothing is computed there, but a number may be rounded once"
    assert (embeddings.max == 5.0 * 2.0**-24).all()
    assert noise.floor("norm", size, kept).rms.min() == np.median(noise.accumulated["norm"].rms)


def _model_and_tokens():
    model = broken_ports.tiny_model()
    return model, tiny.random_tokens(model.config, 2, 8)


def test_without_a_model_the_floor_is_the_documented_one():
    from npllama.compare.noise import Norms, default_noise

    size, kept = Norms(np.array([3.0]), np.array([9.0])), np.ones(1, bool)
    for precision, bits in (("float64", 53), ("float32", 24), ("bfloat16", 8), ("float16", 11)):
        floor = default_noise(precision).floor("norm", size, kept)
        assert [float(x[0]) for x in floor] == [3.0 * factor * 2.0**-bits for factor in DEFAULTS[precision]]


def test_float64_candidates_are_judged_by_float64s_noise(tmp_path):
    model, tokens = _model_and_tokens()
    reference = write_trace(model, tokens, tmp_path / "reference", 0, Precision("float64")).path
    arrays = record(model, tokens, precision=Precision("float64"))
    arrays["norm"] = arrays["norm"] * (1 + 1e-15)
    np.savez(tmp_path / "mine.npz", **arrays)
    assert compare(reference, tmp_path / "mine.npz", model=model).equal
    arrays["norm"] = arrays["norm"] * (1 + 1e-12)
    np.savez(tmp_path / "mine.npz", **arrays)
    found = compare(reference, tmp_path / "mine.npz", model=model)
    assert (found.precision, found.first.name) == ("float64", "norm")


def test_a_golden_bundle_brings_its_floor(tmp_path):
    model, tokens = _model_and_tokens()
    write_golden(model, tokens, tmp_path / "golden")
    mine = write_trace(model, tokens, tmp_path / "mine").path
    found = compare(tmp_path / "golden", mine)
    assert found.equal, found.verdict
    assert found.noise.source.startswith("that of the golden bundle")
    bundled = json.loads((tmp_path / "golden" / "trace.json").read_text())["activations"]["norm"]["noise"]["float32"]["rms"]
    assert (found.noise.accumulated["norm"].rms == bundled).all()


def test_the_first_tokens_size_hides_nothing(tmp_path):
    """In trained models the first token's residual stream is a thousand times the others': one number for the whole array would
    take its noise for theirs."""
    model, tokens = _model_and_tokens()
    arrays = record(model, tokens, precision=Precision("float64"))
    arrays["layers.1.out"][0] *= 1e4
    np.savez(tmp_path / "reference.npz", **arrays)
    arrays["layers.1.out"][5] *= 1 + 1e-3
    np.savez(tmp_path / "mine.npz", **{name: x.astype(np.float32) for name, x in arrays.items()})
    found = compare(tmp_path / "reference.npz", tmp_path / "mine.npz")
    assert (found.first.name, found.first.judged.token) == ("layers.1.out", 5)


def test_one_wrong_number_among_many_is_seen_by_its_size(tmp_path):
    """In bfloat16 one wrong logit of many drowns in the root mean square, but not in the largest difference."""
    rng = np.random.RandomState(0)
    logits = rng.normal(size=(2, 20000))
    mine = logits.copy()
    mine[1, 7] += 4.0
    np.savez(tmp_path / "reference.npz", logits=logits)
    np.savez(tmp_path / "mine.npz", logits=mine)
    found = compare(tmp_path / "reference.npz", tmp_path / "mine.npz", precision="bfloat16")
    assert (found.first.judged.norm, found.first.judged.token) == ("max", 1)
