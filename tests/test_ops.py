"""The mathematics by its properties and known answers; torch's own numbers are in test_goldens.py and test_torch.py."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

from npllama import ops
from npllama.engine import linear, threads

from tiny import LLAMA_3_1, LLAMA_3_2, byte_swapped, relative_error, uniform

DTYPES = ["float32", "float64"]


def test_rms_norm_known_answer():
    y = ops.rms_norm(np.array([[0, 2], [1, 3]], np.float32), np.ones(2, np.float32), 1e-6)
    np.testing.assert_allclose(y, [[0, 1.4142132], [0.44721353, 1.3416406]], rtol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_does_not_see_the_scale(dtype):
    x, weight = uniform(1, (5, 96)).astype(dtype), uniform(2, (96,)).astype(dtype)
    y = ops.rms_norm(x, weight, 1e-30)
    for scale in (10, 100):
        assert relative_error(ops.rms_norm(scale * x, weight, 1e-30), y) < 4 * np.finfo(dtype).eps


def test_rms_norm_eps_is_inside_the_root():
    x = np.full((1, 4), 1e-3)
    np.testing.assert_allclose(ops.rms_norm(x, np.ones(4), 3e-6), x / math.sqrt(1e-6 + 3e-6), rtol=1e-14)


def test_softmax_rows_sum_to_one_and_survive_large_scores():
    x = np.array([[1000.0, 1001.0, -math.inf], [-1e30, 0.0, 0.0]], np.float32)
    y = ops.softmax(x)
    np.testing.assert_allclose(y, [[1 / (1 + math.e), math.e / (1 + math.e), 0], [0, 0.5, 0.5]], rtol=1e-6)
    assert y[0, 2] == 0


def test_silu_at_its_ends():
    x = np.array([-1e4, -100, 0, 100, 1e4], np.float32)
    y = ops.silu(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [0, 0, 0, 100, 1e4], rtol=0, atol=1e-41)


def test_rope_frequencies_of_llama_3():
    frequencies = ops.rope_frequencies(128, 500000.0, None, "float64")
    np.testing.assert_allclose(frequencies[[0, 1, 2, -1]], [1, 0.81462, 0.66360, 2.4551e-06], rtol=2e-5)


@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_2], ids=["factor8", "factor32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_frequencies_keep_short_waves_and_stretch_long_ones(scaling, dtype):
    plain = ops.rope_frequencies(128, 500000.0, None, dtype)
    scaled = ops.rope_frequencies(128, 500000.0, scaling, dtype)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_array_equal(scaled[long], plain[long] / np.asarray(scaling.factor, dtype))
    between = ~short & ~long
    assert between.sum() > 3
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / scaling.factor).all()
    assert (np.diff(scaled) < 0).all()
    # Between them, the part that is kept grows linearly with the number of waves that fit the original context.
    kept = (scaled - plain / scaling.factor) / (plain - plain / scaling.factor)
    linear = np.interp(8192 / wavelengths.astype("float64"), [scaling.low_freq_factor, scaling.high_freq_factor], [0, 1])
    np.testing.assert_allclose(kept, linear, rtol=0, atol=12 * np.finfo(dtype).eps)


def rotated(x, position, dtype="float64", theta=10000.0):
    frequencies = ops.rope_frequencies(x.shape[-1], theta, None, dtype)
    return ops.rope(x, *ops.rope_rotation(np.array([position]), frequencies))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_keeps_lengths(dtype):
    x = uniform(3, (1, 4, 16)).astype(dtype)
    pairs = np.linalg.norm(x.reshape(1, 4, 8, 2), axis=-1)
    for position in (0, 1, 1000):
        y = rotated(x, position, dtype)
        np.testing.assert_allclose(np.linalg.norm(y.reshape(1, 4, 8, 2), axis=-1), pairs, rtol=8 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(rotated(x, 0, dtype), x)


def test_rotation_sees_only_distances():
    q, k = uniform(4, (1, 1, 64)).astype("float64"), uniform(5, (1, 1, 64)).astype("float64")
    scores = [np.sum(rotated(q, m + 7) * rotated(k, m)) for m in (0, 1, 50, 400)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-10)
    assert abs(np.sum(rotated(q, 8) * rotated(k, 0)) - scores[0]) > 1e-3


def test_the_complex_form_of_rope_is_the_same():
    x = uniform(6, (9, 3, 32)).astype("float64")
    positions, frequencies = np.arange(9), ops.rope_frequencies(32, 10000.0, None, "float64")
    z = x.view(np.complex128) * np.exp(1j * np.outer(positions, frequencies))[:, None]
    np.testing.assert_allclose(ops.rope(x, *ops.rope_rotation(positions, frequencies)), z.view(np.float64), rtol=0, atol=1e-14)


def test_float32_angles_differ_from_exact_ones_as_torch_s_do():
    """Measure what rope_rotation documents: angles of thousands of radians are off by up to about 1e-3 in float32."""
    positions = np.arange(15_900, 16_000)
    single, exact = (ops.rope_frequencies(128, 500000.0, None, dtype) for dtype in DTYPES)
    error = np.abs((positions[:, None].astype("float32") * single).astype("float64") - positions[:, None] * exact)
    assert 2e-4 < error.max() < 1.2e-3
    cos, _ = ops.rope_rotation(positions, single)
    exact_cos, _ = ops.rope_rotation(positions, exact)
    assert 1e-4 < np.abs(cos - exact_cos).max() < 1.2e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_foreign_byte_order_gives_the_same_numbers(dtype):
    x, q = uniform(1, (5, 32)).astype(dtype), uniform(2, (5, 4, 8)).astype(dtype)
    rotation = ops.rope_rotation(np.arange(5), ops.rope_frequencies(8, 1e4, None, dtype))
    mask = ops.causal_mask(np.full(5, 5), np.arange(5), dtype)  # hides nothing: finite
    keys, weights = q.swapaxes(0, 1)[:2], ops.softmax(uniform(3, (4, 5, 5)).astype(dtype))
    calls = {
        ops.rms_norm: (x, x[0], 1e-5),
        ops.softmax: (x,),
        ops.silu: (x,),
        ops.swiglu: (x, x),
        ops.rope_rotation: (np.arange(5), ops.rope_frequencies(8, 1e4, None, dtype)),
        ops.rope: (q, *rotation),
        ops.attention_scores: (q, keys, mask),
        ops.attention_heads: (weights, keys),
    }
    for operation, arguments in calls.items():
        others = [byte_swapped(a) if isinstance(a, np.ndarray) else a for a in arguments]
        found, expected = np.asarray(operation(*others)), np.asarray(operation(*arguments))  # cos and sin as one array
        assert found.dtype == dtype, operation.__name__
        assert relative_error(found, expected) < (1e-6 if dtype == "float32" else 1e-14), operation.__name__


def test_mask_lets_each_query_see_its_past_and_itself():
    mask = ops.causal_mask(np.array([2, 3]), np.array([0, 1, 2, 3]), "float32")
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, [[[0, 0, 0, -math.inf], [0, 0, 0, 0]]])


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (6, 1), (4, 4), (8, 2)])
def test_grouped_queries_equal_repeated_heads(heads, kv_heads):
    T, S, K = 3, 5, 8
    q = uniform(7, (2, T, heads, K)).astype("float64")
    keys, values = (uniform(seed, (2, kv_heads, S, K)).astype("float64") for seed in (8, 9))
    mask = ops.causal_mask(np.arange(2, 5), np.arange(5), "float64")
    weights = ops.softmax(ops.attention_scores(q, keys, mask))
    found = ops.attention_heads(weights, values)
    repeated = [np.repeat(x, heads // kv_heads, axis=1) for x in (keys, values)]  # head h uses h // R
    for b in range(2):
        for h in range(heads):
            scores = q[b, :, h] @ repeated[0][b, h].T / math.sqrt(K) + mask[0]
            expected = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True) @ repeated[1][b, h]
            np.testing.assert_allclose(found[b, :, h], expected, rtol=2e-13)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the upper half of each float32, truncated: any bits will do where only widening is tested."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def test_every_bfloat16_widens_to_its_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    found = linear.widen(bits)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    assert np.isnan(found[~numbers]).all()


@pytest.mark.parametrize("pack", [bfloat16, lambda x: x.astype(np.float16)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (2, 3, 96)], ids=str)
def test_a_packed_product_is_the_widened_product(pack, shape, monkeypatch):
    monkeypatch.setattr(linear, "tile_size", lambda n: 96 * 10)  # 10 rows a tile: the last of 53 is a part
    weight = pack(uniform(10, (53, 96)))
    x = uniform(11, shape)
    y = linear.linear(x, weight)
    assert y.dtype == np.float32
    assert y.shape == (*shape[:-1], 53)
    assert relative_error(y, x.astype("float64") @ linear.widen(weight).astype("float64").T) < 1e-6


def test_a_packed_product_never_widens_the_whole_weight():
    import tracemalloc

    weight = bfloat16(uniform(12, (8192, 2048)))
    x = uniform(13, (1, 2048))
    tracemalloc.start()
    linear.linear(x, weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * linear.tile_size(threads.n_threads()) * (threads.n_threads() + 1) < 4 * weight.size / 4


SIGNATURES = {
    "rms_norm": "x, weight, eps",
    "softmax": "x",
    "silu": "x",
    "swiglu": "gate, up",
    "rope_frequencies": "head_dim, theta, scaling, dtype",
    "rope_rotation": "positions, frequencies",
    "rope": "x, cos, sin",
    "causal_mask": "query_positions, slot_positions, dtype",
    "query_key_products": "q, keys",
    "attention_scores": "q, keys, mask",
    "attention_heads": "weights, values",
}


def test_the_signatures_are_frozen():
    """Freeze them: other implementations are checked with them, and a default would hide a constant of the model."""
    functions = {name: f for name, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ == ops.__name__}
    found = {name: inspect.signature(function).parameters for name, function in functions.items()}
    assert {name: ", ".join(parameters) for name, parameters in found.items()} == SIGNATURES
    assert all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for ps in found.values() for p in ps.values())
