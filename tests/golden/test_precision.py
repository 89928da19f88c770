"""Compare simulated precisions with the formats themselves and, operation by operation, against torch on the CPU."""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict

import numpy as np
import pytest

from npllama import forward, ops
from npllama.engine.grouped import to_int4
from npllama.golden.precision import (
    PARTS,
    PROFILES,
    SUMS,
    Precision,
    profile,
    round_bfloat16,
    round_float16,
    round_q8_0,
    round_q8_k,
    rounding_ops,
    sequential_norms,
)
from npllama.model import PLAIN

import tiny

CONFIG = tiny.CONFIGS["grouped"]
PARAMS = tiny.random_params(CONFIG, seed=1)
TOKENS = tiny.random_tokens(CONFIG, seed=2, shape=9)


def tricky_floats() -> np.ndarray:
    """Return every upper half of a float32 with the lower halves around a tie, and random bits."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    random = np.random.RandomState(0).randint(0, 1 << 32, size=1 << 20, dtype=np.uint32)
    return np.concatenate([(upper[:, None] | lower).ravel(), random]).view(np.float32)


def tricky_halves() -> np.ndarray:
    """Return every float16, the float32 halfway to its neighbour, and the float32 on each side of that."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        middles = (halves + np.roll(halves, -1)) / 2
    return np.concatenate([halves, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])


def assert_same_numbers(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    expected = expected.astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(("name", "round_"), [("bfloat16", round_bfloat16), ("float16", round_float16)])
def test_rounding_is_that_of_ml_dtypes(name, round_):
    x = np.concatenate([tricky_floats(), tricky_halves()])
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    assert_same_numbers(round_(x), x.astype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float16))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(("name", "round_"), [("bfloat16", round_bfloat16), ("float16", round_float16)])
def test_rounding_is_that_of_torch(name, round_):
    import torch

    x = np.concatenate([tricky_floats(), tricky_halves()])
    assert_same_numbers(round_(x), torch.from_numpy(x).to(getattr(torch, name)).float().numpy())


@pytest.mark.parametrize("round_", [round_bfloat16, round_float16])
def test_rounding_twice_changes_nothing_and_keeps_the_shape(round_):
    x = tiny.uniform(3, (4, 6, 8)).swapaxes(0, 1)[::2]  # neither contiguous nor whole
    once = round_(x)
    assert once.shape == x.shape
    assert (once != x).any()
    np.testing.assert_array_equal(round_(once), once)


def test_float32_is_the_plain_forward_pass_bit_for_bit():
    np.testing.assert_array_equal(Precision("float32").forward(PARAMS, CONFIG, TOKENS), forward(PARAMS, CONFIG, TOKENS))


def test_float64_is_the_forward_pass_with_float64_parameters():
    logits = Precision("float64").forward(PARAMS, CONFIG, TOKENS)
    assert logits.dtype == np.float64
    params = {name: x.astype(np.float64) for name, x in PARAMS.items()}
    np.testing.assert_array_equal(logits, forward(params, CONFIG, TOKENS))


@pytest.mark.parametrize("convention", ["meta", "hf"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_activation_of_a_16_bit_precision_has_only_its_numbers(name, convention):
    precision = Precision(name, convention)

    def tap(name, x):
        assert x.dtype == np.float32, name
        np.testing.assert_array_equal(precision.round(x), x)
        return x

    precision.forward(PARAMS, CONFIG, TOKENS, tap=tap)


@pytest.mark.parametrize("convention", ["meta", "hf"])
def test_rounding_changes_nothing_else(convention):
    """Check that operations that round to the number itself are the plain ones."""
    unrounded = rounding_ops(lambda x: x, convention)
    plain, found = (forward(PARAMS, CONFIG, TOKENS, ops=ops) for ops in (PLAIN, unrounded))
    assert found.dtype == np.float32
    assert tiny.relative_error(found, plain) < 1e-5


def test_sums_in_sequence_are_the_same_within_rounding():
    one_by_one = sequential_norms(PLAIN)
    scores = 300 * tiny.uniform(5, (2, 3, 7))
    np.testing.assert_allclose(one_by_one.softmax(scores), ops.softmax(scores), rtol=1e-5, atol=1e-30)
    x, weight = tiny.uniform(6, (2, 3, 9)), tiny.uniform(7, (9,))
    np.testing.assert_allclose(one_by_one.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5), rtol=1e-5)


@pytest.mark.parametrize(("convention", "rounded"), [("meta", False), ("hf", True)])
def test_products_are_rounded_before_they_are_added_in_hugging_face_s_rotation_alone(convention, rounded):
    operations = rounding_ops(np.rint, convention)
    x, positions = 100 * tiny.uniform(4, (5, 2, 8)), np.arange(5)
    y = operations.rope(x, *ops.rope_rotation(positions, np.array([1, 0.3, 0.1, 0.02], np.float32)))
    assert np.array_equal(np.rint(y), y) == rounded


@pytest.mark.parametrize(("convention", "rounded"), [("meta", False), ("hf", True)])
def test_cosines_are_rounded_in_hugging_face_s_way_alone(convention, rounded):
    precision = Precision("bfloat16", convention)
    for x in precision.ops.rope_rotation(np.arange(1, 9), np.array([1.0, 0.1], np.float32)):
        assert np.array_equal(precision.round(x), x) == rounded


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["float32", "float64", "float16", "uint16"])
def test_parameters_are_rounded_once_whatever_they_are_stored_in(name, storage):
    """Store the same numbers, few enough bits for every format, in each storage."""
    rounded = {key: round_float16(round_bfloat16(x)) for key, x in PARAMS.items()}

    def pack(x):
        return (x.view(np.uint32) >> 16).astype(np.uint16) if storage == "uint16" else x.astype(storage)

    stored = {key: pack(x) if x.ndim == 2 else x for key, x in rounded.items()}
    found = Precision(name).forward(stored, CONFIG, TOKENS)
    expected = Precision(name).forward(rounded, CONFIG, TOKENS)
    assert found.dtype == expected.dtype
    assert tiny.relative_error(found, expected) < (1e-2 if name in ("bfloat16", "float16") else 1e-5)


def test_a_weight_between_two_bfloat16_numbers_counts_as_the_nearest():
    rounded = {key: round_bfloat16(x) for key, x in PARAMS.items()}
    found, expected = (Precision("bfloat16").forward(params, CONFIG, TOKENS) for params in (PARAMS, rounded))
    np.testing.assert_array_equal(found, expected)


def test_names_other_than_those_offered_are_refused():
    with pytest.raises(ValueError, match=r"precision is 'float8', expected float64"):
        Precision("float8")
    with pytest.raises(ValueError, match=r"convention is 'huggingface', expected meta or hf"):
        Precision("bfloat16", "huggingface")
    assert Precision("float32", "hf").convention is None
    assert Precision("float16").convention == "meta"


# --------------------------------------------------------------------------------- the further roundings of quantised ports


def test_8_bits_are_those_of_the_gguf_package():
    """Compare with Q8_0 by llama.cpp's authors, who round ties away from zero, which no random number meets."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    x = tiny.uniform(4, (5, 8, 96)) * np.float32(30)
    x[0, 0, :32] = 0
    x[1, 1, 32:64] *= np.float32(1e-6)  # whose scale is a subnormal float16
    kind = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(round_q8_0(x), gguf.dequantize(gguf.quantize(x, kind), kind))


def test_8_bits_in_blocks_of_256_are_multiples_of_a_scale_of_the_largest():
    x = tiny.uniform(5, (3, 512))
    y, blocks = round_q8_k(x).reshape(3, 2, 256), x.reshape(3, 2, 256)
    scale = np.max(np.abs(blocks), axis=-1, keepdims=True) / 127
    assert np.all(np.abs(y - blocks) <= scale * 0.500001)
    assert np.max(np.abs(y / scale - np.rint(y / scale))) < 1e-4
    assert len(np.unique(np.rint(y / scale))) > 100
    assert not round_q8_k(np.zeros((2, 256), np.float32)).any()


@pytest.mark.parametrize("round_", [round_q8_0, round_q8_k])
def test_8_bits_are_the_same_in_float64_and_a_last_block_may_be_short(round_):
    x = tiny.uniform(6, (2, 3, 40))
    once = round_(x)
    assert once.shape == x.shape
    wide = round_(x.astype(np.float64))
    assert wide.dtype == np.float64
    np.testing.assert_array_equal(wide, once)


def test_sums_in_8_bits_are_rounded_to_float16():
    """Block by block in Python, as ggml's quantize_row_q8_1 and ggml_vec_dot_q4_1_q8_1 compute, with struct's float16."""

    def half(number):
        return struct.unpack("<e", struct.pack("<e", float(number)))[0]

    x, weight = tiny.uniform(7, (3, 64)), to_int4(tiny.uniform(8, (5, 64)))
    scale, offset = (level.T.astype(float) for level in weight.all_levels())  # [out, 2]
    q_w = np.rint((weight.widen().reshape(5, 2, 32) - offset[..., None]) / scale[..., None]).astype(int)
    expected = np.zeros((3, 5))
    for t, o, b in np.ndindex(3, 5, 2):
        block = x[t, 32 * b : 32 * b + 32]
        d = np.max(np.abs(block)) / np.float32(127)
        q = [round(float(number * (np.float32(1) / d))) for number in block]
        whole = sum(a * int(w) for a, w in zip(q, q_w[o, b], strict=True))
        expected[t, o] += scale[o, b] * half(d) * whole + offset[o, b] * half(d * np.float32(sum(q)))
    for name in ("float64", "float32"):
        precision = Precision(name, parts=(SUMS,))
        found = precision.ops.linear(x.astype(name), precision.weight(weight))
        assert found.dtype == name
        # Each kernel of a BLAS adds float32 numbers in its own order.
        bound = 2e-6 if name == "float64" else 4 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(weight.widen()).T).max()
        assert bound < 5e-5  # what rounding the sums changes is more, see below
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
        assert np.array_equal(found, precision.ops.linears(x.astype(name), precision.weight(weight))[0])
    unrounded = Precision("float64", parts=("int8-activations",))
    assert np.max(np.abs(unrounded.ops.linear(x.astype(float), unrounded.weight(weight)) - expected)) > 1e-4


def test_the_profile_of_rounded_sums_needs_weights_with_offsets():
    """Refuse plain weights: offsets can't be recovered from numbers, and the model must not pass for one with rounded sums."""
    precision = profile(SUMS)
    assert precision.load_dtype == "stored"
    with pytest.raises(
        ValueError, match="int8-activations-sums rounds the inputs of Q4_1 and Q5_1 weights: found no such weights"
    ):
        precision.forward(PARAMS, CONFIG, TOKENS)
    assert Precision().load_dtype == "auto"
    packed = {name: to_int4(x) if x.ndim == 2 and not x.shape[1] % 32 else x for name, x in PARAMS.items()}
    logits = precision.forward(packed, CONFIG, TOKENS)
    eight_bits = profile("int8-activations").forward(packed, CONFIG, TOKENS)
    assert 1e-6 < tiny.relative_error(logits, eight_bits) < 0.1


@pytest.mark.parametrize("part", [part for part in PARTS if part != SUMS])
def test_a_part_is_float32s_pass_with_rounded_inputs_of_products(part):
    """Compute each product by hand, from the inputs that the pass itself has recorded."""
    recorded, exact = {}, {}
    Precision("float32", parts=(part,)).forward(PARAMS, CONFIG, TOKENS, tap=lambda name, x: recorded.setdefault(name, x))
    Precision("float32").forward(PARAMS, CONFIG, TOKENS, tap=lambda name, x: exact.setdefault(name, x))
    norm, q, k, v, weights = (recorded[f"layers.0.{name}"] for name in (
        "attention_norm", "attention.q_rope", "attention.k_rope", "attention.v", "attention.weights"))  # fmt: skip
    wq, R = PARAMS["layers.0.attention.wq.weight"], CONFIG.n_heads // CONFIG.n_kv_heads
    of_8_bits = {
        "int8-activations": round_q8_0,
        "int8-activations-256": round_q8_k,
        "float16-activations": round_float16,
        "bfloat16-activations": round_bfloat16,
    }.get(part, lambda x: x)
    of_16_bits = round_float16 if part == "float16-cache" else lambda x: x
    T = len(norm)
    np.testing.assert_allclose(recorded["layers.0.attention.q"].reshape(T, -1), of_8_bits(norm) @ wq.T, rtol=1e-5, atol=1e-5)
    keys, values = (of_16_bits(np.repeat(x, R, axis=1)) for x in (k, v))
    scores = np.einsum("thk,shk->hts", of_16_bits(q), keys) / np.float32(math.sqrt(CONFIG.head_dim))
    seen = np.isfinite(recorded["layers.0.attention.scores"])
    np.testing.assert_allclose(recorded["layers.0.attention.scores"][seen], scores[seen], rtol=1e-5, atol=1e-5)
    heads = np.einsum("hts,shk->thk", of_16_bits(weights), values)
    np.testing.assert_allclose(recorded["layers.0.attention.heads"], heads, rtol=1e-5, atol=1e-5)
    assert 1e-5 < tiny.relative_error(recorded["logits"], exact["logits"]) < 0.1


@pytest.mark.parametrize("text", PROFILES)
def test_a_profile_is_a_precision_with_its_parts(text):
    found = profile(text)
    assert found.profile == text
    name, *parts = text.split("+")
    if name in PARTS:
        assert (found.name, found.parts) == ("float32", (name, *parts))
    else:
        assert (found.name, found.convention) == (
            name.split("-")[0],
            Precision(name.split("-")[0], name[-2:] if "-" in name else None).convention,
        )


@pytest.mark.parametrize(
    "text", ["", "float8", "float32-hf", "int8", "float16-cache+float16-cache", "int8-activations+int8-activations-256", "+"]
)
def test_a_profile_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"profile is .*, expected one such as float64, float32"):
        profile(text)


def test_a_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"a part of the precision is 'int4', expected float16-cache"):
        Precision("float32", parts=("int4",))


# --------------------------------------------------------------------------------------------------------- against torch

CASES = {  # K = 24 and 32 are no powers of four: 1 / sqrt(K) must be rounded as torch does
    "wide": tiny.config(dim=192, head_dim=32, ffn_dim=512, vocab_size=2256),
    "narrow": tiny.config(n_heads=4, head_dim=24),
}
CASE_PARAMETERS = [
    (dtype, convention, case) for dtype in ("bfloat16", "float16") for convention in ("hf", "meta") for case in CASES
]


def torch_model(config, params, convention):
    if convention == "meta":
        from meta_reference import meta_model

        return meta_model(config, params)
    pytest.importorskip("transformers", reason="transformers is not installed")
    from hf_reference import hf_model

    return hf_model(config, params)


def unit_in_the_last_place(x: np.ndarray, name: str) -> np.ndarray:
    """Return the distance of the format's numbers in the binade of |x|."""
    significant_bits = {"bfloat16": 8, "float16": 11}[name]
    return np.ldexp(1.0, np.frexp(x)[1] - significant_bits)


@pytest.mark.torch
@pytest.mark.parametrize(("dtype", "convention", "case"), CASE_PARAMETERS)
def test_each_operation_on_torchs_own_inputs_is_torchs(tmp_path, record_property, dtype, convention, case):
    """Replace our activations by torch's in the tap, so that every operation starts from torch's own.

    99.9 % of the elements of each are the same bits and the others within one unit in the last place of their row's largest. In
    float16 a matrix product's order of summation shows more often, because the float32 it is summed in has only 13 bits more:
    99.7 % there, 99.9 % over all operations together.
    """
    config, precision = CASES[case], Precision(dtype, convention)
    params = {name: precision.round(x) for name, x in tiny.random_params(config, seed=1).items()}
    model = torch_model(config, params, convention)
    from npllama_convert.capture import capture

    tokens = tiny.random_tokens(config, 2, 48)
    theirs = capture(model, tokens, tmp_path / "t", dtype=dtype)
    same, total, worst = defaultdict(int), defaultdict(int), defaultdict(float)

    def tap(name, ours):
        expected = np.asarray(theirs[name])
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(ours[~finite], expected[~finite])
        kind = re.sub(r"layers\.\d+\.", "", name)
        same[kind] += int(np.count_nonzero((ours == expected) & finite))
        total[kind] += int(np.count_nonzero(finite))
        largest = np.max(np.abs(expected), axis=-1, keepdims=True, where=finite, initial=0)
        difference = np.abs(np.subtract(ours, expected, where=finite, out=np.zeros_like(ours)))
        worst[kind] = max(worst[kind], float(np.max(difference / unit_in_the_last_place(largest, dtype))))
        return expected

    precision.forward(params, config, tokens, tap=tap)
    assert len(total) == 20
    for kind in total:
        print(f"{kind:22} {same[kind] / total[kind]:9.4%} of {total[kind]:6} identical, others within {worst[kind]:.2f} units")
    overall = sum(same.values()) / sum(total.values())
    print(f"{'all':22} {overall:9.4%}")
    record_property("identical", overall)
    assert overall >= 0.999
    for kind in total:
        assert same[kind] / total[kind] >= (0.999 if dtype == "bfloat16" else 0.997), kind
        assert worst[kind] <= 1, kind


@pytest.mark.torch
@pytest.mark.parametrize("K", [8, 32, 128])
@pytest.mark.parametrize("convention", ["hf", "meta"])
def test_float16_scores_are_scaled_as_torch_scales_them(convention, K):
    """Compare conventions: Hugging Face multiplies by K^-0.5, Meta divides by sqrt(K).

    At these K one product in 1024 rounds to another float16. Where K is a power of 4 both are exact. In bfloat16 no product
    differs, at any even K up to 256.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    products = np.arange(1024, 2048).astype(np.float32)  # every mantissa of 11 bits
    q, keys = np.zeros((1024, 1, K), np.float32), np.zeros((1, 1, K), np.float32)
    q[:, 0, 0], keys[..., 0] = products, 1
    scaled = {"hf": torch.from_numpy(products).half() * K**-0.5, "meta": torch.from_numpy(products).half() / math.sqrt(K)}
    found = Precision("float16", convention).ops.attention_scores(q, keys, np.zeros((1, 1024, 1), np.float32))[0, :, 0]
    np.testing.assert_array_equal(found, scaled[convention].float().numpy())
    assert np.count_nonzero(scaled["hf"] != scaled["meta"]) == 1


@pytest.mark.torch
@pytest.mark.parametrize(("dtype", "convention", "case"), CASE_PARAMETERS)
def test_end_to_end_the_error_is_as_large_as_torchs(tmp_path, record_property, dtype, convention, case):
    """Leave Hugging Face's RoPE frequencies in float32 (capture runs a copy in which `.to()` has not rounded them)."""
    config, precision = CASES[case], Precision(dtype, convention)
    params = {name: precision.round(x) for name, x in tiny.random_params(config, seed=1).items()}
    model = torch_model(config, params, convention)
    from npllama_convert.capture import capture

    tokens = tiny.random_tokens(config, 2, 48)
    exact = Precision("float64").forward(params, config, tokens)
    theirs = capture(model, tokens, tmp_path / "t", dtype=dtype)["logits"]
    ours = precision.forward(params, config, tokens)
    ratio = np.sqrt(np.mean((ours - exact) ** 2) / np.mean((theirs - exact) ** 2))
    print(f"rms error over torch's: {ratio:.3f}")
    record_property("ratio", float(ratio))
    assert 0.75 < ratio < 1.33
