"""Test GGUF: every kind of block, the metadata's constants to the last digit, and damaged headers."""

from __future__ import annotations

import os
import shutil
import struct
import sys

import numpy as np
import pytest

from npllama import Config, LinearRopeScaling, RopeScaling, forward, load
from npllama.checkpoint import open_model, verify
from npllama.engine.grouped import Grouped
from npllama.engine.linear import to_bfloat16, widen
from npllama_convert import gguf as reader
from npllama_convert import sources

import tiny
from conversions import assert_same, convert, refused
from tiny import relative_error, uniform

library = pytest.importorskip("gguf", reason="gguf is not installed")
foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)

CONFIG = tiny.config(n_layers=1)
WIDE = tiny.config(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=256, vocab_size=20)  # whole K-blocks
CONFIGS = tiny.CONFIGS | {"linear": tiny.config(rope_scaling=LinearRopeScaling(2.5), n_layers=1)}
PARAMS = tiny.random_params(CONFIG, seed=5)


@pytest.fixture(autouse=True)
def small_blocks(quick_conversion):
    """Read in blocks of a few rows."""


# ------------------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_comes_back_bit_for_bit(tmp_path, name):
    config = CONFIGS[name]
    params = tiny.random_params(config, seed=5)
    convert(foreign.write_gguf(tmp_path / "m.gguf", config, params), tmp_path / "m")
    assert_same(tmp_path / "m", params)
    assert open_model(tmp_path / "m").config == config
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
@pytest.mark.parametrize("length", [0, 32, 57])
def test_the_numbers_begin_where_the_alignment_says(tmp_path, alignment, length):
    """Check that the data begins at a multiple of 32 by default. Of headers that differ by 32, one shows a wrong alignment."""
    metadata = {"general__description": "x" * length} | ({"custom_alignment": alignment} if alignment else {})
    convert(foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, **metadata), tmp_path / "m")
    assert_same(tmp_path / "m", PARAMS)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("name", ["grouped", "one_kv_head"])
def test_each_kind_of_block_is_what_the_library_makes_of_it(tmp_path, name, kind):
    config = tiny.CONFIGS[name]
    params = tiny.random_params(config, seed=5)
    file = foreign.write_gguf(tmp_path / "m.gguf", config, params, kind)
    convert(file, tmp_path / "m")
    expected = {tensor.name: library.dequantize(tensor.data, tensor.tensor_type) for tensor in library.GGUFReader(file).tensors}
    theirs = foreign.gguf_tensors({name: name for name in params})
    for their_name, name in theirs.items():
        array = expected[their_name].reshape(params[name].shape)
        if array.ndim == 2 and kind == "F16":
            expected[their_name] = array.astype(np.float16)
        if array.ndim == 2 and kind == "BF16":
            expected[their_name] = to_bfloat16(array)
    expected = {name: expected[their_name] for their_name, name in theirs.items()}
    if kind in ("F16", "BF16"):
        assert_same(tmp_path / "m", expected)
    else:
        assert_quantised(tmp_path / "m", expected, 4 if kind[1] == "4" else 8)
    error = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q5_0": 0.1, "Q5_1": 0.1, "Q4_0": 0.2, "Q4_1": 0.2}[kind]
    wide = load(tmp_path / "m", "float32").params
    assert all(relative_error(wide[name], array) < error for name, array in params.items())


def assert_quantised(folder, expected: dict[str, np.ndarray], bits: int) -> None:
    """Check that the model directory keeps the matrices' quantisation, and that they widen to the same bits."""
    for name, weight in open_model(folder).params.items():
        if expected[name].ndim == 2:
            assert weight.grouping.bits == bits, name
        assert_same_bits(widen(weight), expected[name])


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.reshape(found.shape).view(np.uint32))


def q6_k_by_hand(block: bytes) -> np.ndarray:
    """Unpack ggml's block_q6_K (ggml-common.h), number by number: 4 low bits, 2 high bits, a scale per 16, one for all."""
    ql, qh, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    d = float(np.frombuffer(block[208:210], np.float16)[0])
    out = np.empty(256, np.float32)
    for i in range(256):
        half, within = divmod(i, 128)
        quarter, at = divmod(within, 32)
        low = ql[64 * half + 32 * (quarter % 2) + at] >> (4 * (quarter // 2)) & 0xF
        high = qh[32 * half + at] >> (2 * quarter) & 3
        out[i] = np.float32(np.float32(d) * np.float32(scales[i // 16])) * np.float32((low | high << 4) - 32)
    return out


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_of_random_bits(tmp_path, kind):
    """Use random bits as blocks, with finite, small float16 scales, since the library can't quantise to these kinds."""
    params = tiny.random_params(WIDE, seed=5)
    quantization = library.GGMLQuantizationType[kind]
    _, block_bytes = library.GGML_QUANT_SIZES[quantization]
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    raw, written = {}, foreign.gguf_tensors(params)
    for name, array in written.items():
        if array.ndim == 1:
            continue
        n = array.size // 256
        blocks = np.random.RandomState(len(raw)).randint(0, 256, (n, block_bytes)).astype(np.uint8)
        for at in scales:
            blocks[:, at : at + 2] = np.full((n, 1), 0.01, np.float16).view(np.uint8)
        raw[name] = blocks.reshape(len(array), -1)
    foreign.write_gguf(tmp_path / "m.gguf", WIDE, params, raw={name: (x, quantization) for name, x in raw.items()})
    convert(tmp_path / "m.gguf", tmp_path / "m")
    found = foreign.gguf_tensors({name: widen(weight) for name, weight in open_model(tmp_path / "m").params.items()})
    for name, blocks in raw.items():
        assert_same_bits(found[name], library.dequantize(blocks, quantization))
    quantised = {name for name, weight in open_model(tmp_path / "m").params.items() if isinstance(weight, Grouped)}
    assert len(quantised) == len(raw)
    # A conversion to a plain dtype widens the same numbers.
    convert(tmp_path / "m.gguf", tmp_path / "wide", dtype="float32")
    assert_same(tmp_path / "wide", {name: widen(weight) for name, weight in open_model(tmp_path / "m").params.items()})
    for weight in open_model(tmp_path / "m").params.values():
        if isinstance(weight, Grouped):
            assert weight.nbytes * 8 / weight.size < (5.2 if kind in ("Q2_K", "Q3_K", "Q4_K") else 8.7)
    if kind == "Q6_K":  # and the library's is what ggml says
        blocks = raw["blk.0.attn_v.weight"][:3].reshape(-1, block_bytes)
        by_hand = np.concatenate([q6_k_by_hand(block.tobytes()) for block in blocks])
        assert np.array_equal(found["blk.0.attn_v.weight"][:3].ravel(), by_hand)


def test_q4_1_is_kept_though_int4_has_its_form(tmp_path):
    """Test any integers and scales, also where 16 values chosen by npllama would differ."""
    params, name = tiny.random_params(WIDE, seed=5), "blk.0.attn_v.weight"
    blocks = np.random.RandomState(3).randint(0, 256, (len(params["layers.0.attention.wv.weight"]), 8, 20)).astype(np.uint8)
    blocks[..., :4] = uniform(4, (*blocks.shape[:2], 2), std=0.02).astype(np.float16).view(np.uint8)
    blocks[:, 3, 4:] = 0x77  # a group of one value alone
    raw, kind = blocks.reshape(len(blocks), -1), library.GGMLQuantizationType.Q4_1
    src = foreign.write_gguf(tmp_path / "m.gguf", WIDE, params, raw={name: (raw, kind)})
    for dtype in ("auto", "int4"):
        convert(src, tmp_path / dtype, dtype=dtype)
        weight = open_model(tmp_path / dtype).params["layers.0.attention.wv.weight"]
        assert_same_bits(widen(weight), library.dequantize(raw, kind))


@pytest.mark.parametrize("kind", ["IQ4_XS", "IQ2_XXS", "MXFP4", "TQ2_0"])
def test_what_is_not_in_groups_with_scales_is_dequantised_by_the_library(tmp_path, kind, monkeypatch):
    quantization = library.GGMLQuantizationType[kind]
    block, block_bytes = library.GGML_QUANT_SIZES[quantization]
    params = tiny.random_params(WIDE, seed=5)
    name, array = "blk.0.attn_v.weight", params["layers.0.attention.wv.weight"]
    raw = np.random.RandomState(1).randint(0, 40, (len(array), array.shape[1] // block * block_bytes)).astype(np.uint8)
    src = foreign.write_gguf(tmp_path / "m.gguf", WIDE, params, raw={name: (raw, quantization)})
    lines = convert(src, tmp_path / "m")
    assert f"{kind}: not stored as such, dequantised to float32 by the package gguf" in lines
    expected = library.dequantize(raw, quantization)
    assert np.ptp(expected) > 0
    assert_same_bits(open_model(tmp_path / "m").params["layers.0.attention.wv.weight"], expected)
    monkeypatch.setattr(sys, "byteorder", "big")  # the library reads in the machine's own order
    refused(src, tmp_path / "big", rf"is {kind}, which the package gguf dequantises on little-endian machines only")


def test_a_quantized_model_rounds_to_16_bits_on_demand(tmp_path):
    file = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, "Q8_0")
    convert(file, tmp_path / "wide")
    convert(file, tmp_path / "m", dtype="bfloat16")
    wide = open_model(tmp_path / "wide").params
    assert_same(tmp_path / "m", {name: to_bfloat16(widen(array)) for name, array in wide.items()})


@pytest.mark.torch
def test_the_logits_of_a_quantized_file_are_transformers_own(tmp_path):
    """Compare with transformers, which reads GGUF itself and permutes queries and keys back to its own layout."""
    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    config = tiny.CONFIGS["grouped"]
    file = foreign.write_gguf(tmp_path / "m.gguf", config, tiny.random_params(config, seed=5), "Q8_0", name="tiny")
    convert(file, tmp_path / "m")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    judge = hf.LlamaForCausalLM(hf.hf_config(config)).eval()
    judge.load_state_dict(load_gguf_checkpoint(file, return_tensors=True, model_to_load=judge)["tensors"])
    model = load(tmp_path / "m")
    tokens = tiny.random_tokens(config, 1, 20)
    assert relative_error(forward(model.params, model.config, tokens), hf.hf_logits(judge, tokens)) < 1e-5


@pytest.mark.parametrize("given", ["first", "last", "folder"])
def test_split_files_are_one_model(tmp_path, given):
    src = tmp_path / "src"
    src.mkdir()
    foreign.write_gguf(src / "x.gguf", CONFIG, PARAMS, n_shards=3)
    files = sorted(src.iterdir())
    assert [file.name for file in files] == [f"x-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    convert({"first": files[0], "last": files[2], "folder": src}[given], tmp_path / "m")
    assert_same(tmp_path / "m", PARAMS)
    assert set(open_model(tmp_path / "m").manifest["source"]["files"]) == {file.name for file in files}


def test_a_lost_part_is_missed_and_one_that_is_there_twice_too(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    foreign.write_gguf(src / "x.gguf", CONFIG, PARAMS, n_shards=3)
    shutil.copy(src / "x-00003-of-00003.gguf", src / "x-00002-of-00003.gguf")
    refused(src, tmp_path / "m", r"x-00003-of-00003\.gguf: .* is in another file already$")
    (src / "x-00002-of-00003.gguf").unlink()
    refused(src, tmp_path / "m", r"x-00002-of-00003\.gguf is missing$")
    foreign.write_gguf(src / "y.gguf", CONFIG, PARAMS)
    refused(src, tmp_path / "m", r"src holds 2 models, among them x-00001-of-00003\.gguf: expected one, or a file's name$")


# ---------------------------------------------------------------------------------------------------------------- the constants


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 9.99e-6, 2.5e-5])
def test_a_float32_constant_is_read_as_the_decimal_it_was(tmp_path, eps):
    config = tiny.config(n_layers=1, norm_eps=eps, rope_theta=1e6 / 3)
    convert(foreign.write_gguf(tmp_path / "m.gguf", config, PARAMS), tmp_path / "m")
    found = open_model(tmp_path / "m").config
    assert found.norm_eps == eps  # to the last bit of the double, as the params.json of the same model has it
    assert np.float32(found.rope_theta) == np.float32(1e6 / 3)


@pytest.mark.parametrize("factor", [2.0, 8.0, 16.0, 32.0])
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 5e5), (64, 5e5), (128, 5e5), (128, 1e6)])
def test_scaled_rope_is_told_from_the_divisors(head_dim, theta, factor):
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    config = tiny.config(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    divisors = reader.Tensor.of(foreign.rope_divisors(config))
    assert reader.scaling_of({}, head_dim, theta, divisors) == scaling


def llama_cpp_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """Compute rope_freqs as convert_hf_to_gguf.py does, in float32 and in its order."""
    old, low, high = 8192, 1.0, 4.0
    frequencies = np.float32(1) / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    out = []
    for frequency in frequencies.astype(np.float32):
        wavelength = np.float32(2 * np.pi) / frequency
        smooth = (old / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        out.append(1.0 if wavelength < old / high else factor if wavelength > old / low else between)
    return np.array(out, np.float32)


@pytest.mark.parametrize(("head_dim", "factor"), [(128, 8.0), (64, 32.0)])
def test_llama_cpp_s_own_divisors_are_recognised(head_dim, factor):
    divisors = reader.Tensor.of(llama_cpp_divisors(head_dim, 5e5, factor))
    assert reader.scaling_of({}, head_dim, 5e5, divisors) == RopeScaling(factor, 1.0, 4.0, 8192)


@pytest.mark.parametrize("change", [lambda x: x * 1.001, lambda x: x[::-1], lambda x: np.minimum(x, 4), lambda x: x * np.nan])
def test_other_divisors_are_refused(tmp_path, change):
    config = tiny.CONFIGS["llama3.1"]
    divisors = change(foreign.rope_divisors(config)).astype(np.float32)
    params = tiny.random_params(config, seed=5)
    src = foreign.write_gguf(tmp_path / "m.gguf", config, params, divisors=divisors)
    refused(src, tmp_path / "m", r"rope_freqs\.weight is a scaling of RoPE other than Llama 3\.1's")


def test_the_old_name_of_linear_scaling_is_understood(tmp_path):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, llama__rope__scale_linear=4.0)
    convert(src, tmp_path / "m")
    assert open_model(tmp_path / "m").config.rope_scaling == LinearRopeScaling(4.0)


def test_linear_scaling_and_divisors_are_one_too_many(tmp_path):
    config = CONFIGS["linear"]
    params = tiny.random_params(config, seed=5)
    src = foreign.write_gguf(tmp_path / "m.gguf", config, params, divisors=np.ones(8, np.float32))
    refused(src, tmp_path / "m", r"rope_freqs\.weight is float32 \[8\], expected float32 \[8\] alone$")


def test_divisors_of_one_are_no_scaling(tmp_path):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, divisors=np.ones(8, np.float32))
    convert(src, tmp_path / "m")
    assert open_model(tmp_path / "m").config == CONFIG


def test_recommended_settings_are_taken_along(tmp_path):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, sampling_temp=0.6, sampling_top_p=0.9)
    convert(src, tmp_path / "m")
    assert open_model(tmp_path / "m").generation == {"chat_format": None, "system": None, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 0.0), (float("nan"), 1.5)])
def test_recommended_settings_that_mean_nothing_are_left_out(tmp_path, temperature, top_p):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, sampling_temp=temperature, sampling_top_p=top_p)
    lines = convert(src, tmp_path / "m")
    assert f"{src}: temperature is {temperature}, expected a number from 0: left out" in lines
    assert f"{src}: top_p is {top_p}, expected a number above 0 and up to 1: left out" in lines
    assert open_model(tmp_path / "m").generation == dict.fromkeys(("chat_format", "system", "temperature", "top_p"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_freq_base": 1e-30}, r"rope_theta is 1e-30, expected a positive number from 1e-12 to 1e\+15$"),
        ({"rope_freq_base": 1e30}, r"rope\.freq_base is 1e\+30, expected a positive number from 1e-30 to 1e\+15$"),
        ({"layer_norm_rms_eps": 1e30}, r"layer_norm_rms_epsilon is 1e\+30, expected a positive number from 1e-30 to"),
    ],
)
def test_constants_that_overflow_are_refused(tmp_path, change, expected):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, **change)
    refused(src, tmp_path / "m", rf"m\.gguf: .*{expected}")


# -------------------------------------------------------------------------------------------------------------- the vocabulary


VOCABULARY = {
    "tokenizer_model": "llama",
    "tokenizer__ggml__tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"],
    "tokenizer__ggml__scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
    "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
}


def test_the_vocabulary_becomes_a_tokenizer(tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    config = tiny.config(n_layers=1, vocab_size=262)
    params = tiny.random_params(config, seed=5)
    lines = convert(foreign.write_gguf(tmp_path / "m.gguf", config, params, **VOCABULARY), tmp_path / "m")
    model = open_model(tmp_path / "m")
    assert model.tokenizer.encode("a", bos=True) == [1, 261]
    assert model.generation["chat_format"] is None
    assert "chat template: none; npllama chat asks for --format" in lines
    assert verify(tmp_path / "m") == []


def test_the_chat_templates_are_stored(tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    config = tiny.config(n_layers=1, vocab_size=262)
    several = [{"name": "rag", "template": "b"}, {"name": "default", "template": "{{ bos_token }}a"}]
    src = foreign.write_gguf(
        tmp_path / "m.gguf", config, tiny.random_params(config, seed=5), chat_template=several, **VOCABULARY
    )
    convert(src, tmp_path / "m")
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ bos_token }}a"
    assert (tmp_path / "m" / "chat_template.rag.jinja").read_text() == "b"
    assert verify(tmp_path / "m") == []


def test_a_vocabulary_of_another_kind_leaves_ids(tmp_path):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, tokenizer_model="rwkv")
    lines = convert(src, tmp_path / "m")
    assert any(line.startswith("the vocabulary is left out: tokenizer.ggml.model is 'rwkv', expected") for line in lines)
    assert open_model(tmp_path / "m").tokenizer is None


def test_ends_outside_the_vocabulary_are_left_out(tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    config = tiny.config(n_layers=1, vocab_size=262)
    ends = {"eos_token_id": 2**32 - 1, "eot_token_id": 262}
    src = foreign.write_gguf(tmp_path / "m.gguf", config, tiny.random_params(config, seed=5), **VOCABULARY, **ends)
    lines = convert(src, tmp_path / "m")
    assert f"{src}: tokenizer.ggml.eos_token_id is 4294967295, expected 0 to 261: left out" in lines
    assert f"{src}: tokenizer.ggml.eot_token_id is 262, expected 0 to 261: left out" in lines
    assert open_model(tmp_path / "m").tokenizer.stop_ids == {2}


# ---------------------------------------------------------------------------------------------------------------- each its line


FOREIGN = {
    "experts": ({"expert_count": 8}, r"llama\.expert_count is 8: an architecture that npllama does not compute$"),
    "another scale": ({"attention_scale": 0.5}, r"llama\.attention\.scale is 0\.5: an architecture"),
    "no mask": ({"causal_attention": False}, r"llama\.attention\.causal is not true: an architecture"),
    "yarn": ({"rope_scaling_type": library.RopeScalingType.YARN}, r"rope\.scaling\.type is 'yarn', expected none or linear$"),
    "linear without a factor": ({"rope_scaling_type": library.RopeScalingType.LINEAR}, r"missing rope\.scale_linear$"),
    "half rotation": ({"rope_dimension_count": 8}, r"llama\.rope\.dimension_count is 8, expected 16 as of the keys$"),
    "no rows": ({"vocab_size": 130}, r"token_embd\.weight is \[131, 96\], expected \[130, 96\]$"),
    "layers of kinds": (
        {"feed_forward_length": [256, 128]},
        r"feed_forward_length is array.*, expected a positive whole number$",
    ),
    "endless layers": ({"block_count": 2**31 - 1}, r"2147483647 layers are announced, but there are only 12 tensors$"),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_what_is_no_plain_llama_is_refused_by_name(tmp_path, fault):
    changes, expected = FOREIGN[fault]
    refused(foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, **changes), tmp_path / "m", r"m\.gguf: .*" + expected)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma", "llama4", "mllama"])
def test_other_architectures_are_refused_by_name(tmp_path, architecture):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, architecture=architecture)
    refused(src, tmp_path / "m", rf"general\.architecture is '{architecture}', expected 'llama'$")


def test_biases_are_refused_by_name(tmp_path):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, more={"blk.0.attn_q.bias": np.ones(96, np.float32)})
    refused(src, tmp_path / "m", r"blk\.0\.attn_q\.bias: Llama has no biases")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def head(n_tensors: int = 0, n_values: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_values)


def array(kind: int, n: int) -> bytes:
    return string("x") + struct.pack("<IIQ", 9, kind, n)


def tensor(dims=(32,), kind=0, offset=0, name="x") -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 1 << 62
BAD = {
    "only the magic": (b"GGUF", "its header is damaged or cut off: 4 bytes announced at 4$"),
    "version 1": (head(version=1), r"GGUF version 1, expected 2 or 3 \(little-endian\)$"),
    "big-endian": (head(version=3 << 24), r"GGUF version 50331648, expected 2 or 3 \(little-endian\)$"),
    "a huge number of values": (head(n_values=HUGE) + string("a") + struct.pack("<II", 4, 1), "8 bytes announced at 41$"),
    "a huge number of tensors": (head(n_tensors=HUGE), "8 bytes announced at 24$"),
    "a huge key": (head(n_values=1) + struct.pack("<Q", HUGE), "4,611,686,018,427,387,904 bytes announced at 32$"),
    "a negative length": (head(n_values=1) + struct.pack("<q", -1), "18,446,744,073,709,551,615 bytes announced at 32$"),
    "a huge array": (head(n_values=1) + array(4, HUGE), "18,446,744,073,709,551,616 bytes announced at"),
    "a huge array of texts": (head(n_values=1) + array(8, HUGE), "36,893,488,147,419,103,232 bytes announced at"),
    "nested arrays": (head(n_values=1) + array(9, 1), "a value of type 9 before"),
    "an unknown type": (head(n_values=1) + string("x") + struct.pack("<I", 13), "a value of type 13 before"),
    "not UTF-8": (head(n_values=1) + struct.pack("<Q", 2) + b"\xff\xfe", "a text at 32 is not UTF-8$"),
    "a key twice": (head(n_values=2) + 2 * (string("x") + struct.pack("<II", 4, 1)), "x is there twice$"),
    "a tensor twice": (head(2) + 2 * tensor() + bytes(1000), "tensor x is there twice$"),
    "many dimensions": (head(1) + tensor((1,) * 5), "tensor x has 5 dimensions, expected 1 to 4$"),
    "no dimensions": (head(1) + tensor(()), "tensor x has 0 dimensions, expected 1 to 4$"),
    "no rows": (head(1) + tensor((32, 0)) + bytes(100), r"x is \[0, 32\], expected rows of a multiple of 1 numbers$"),
    "an overflowing shape": (head(1) + tensor((HUGE, HUGE, HUGE)) + bytes(100), "bytes at 0, but there are"),
    "beyond the end": (head(1) + tensor(offset=HUGE) + bytes(1000), "128 bytes at 4,611,686,018,427,387,904, but there are"),
    "a broken block": (head(1) + tensor((33, 2), kind=2) + bytes(1000), r"x is \[2, 33\], expected rows of a multiple of 32"),
    "a type that is not read": (
        head(1) + tensor((256, 2), kind=9) + bytes(1000),
        "x is Q8_1, which gguf can't dequantise: expected F32, F16, BF16, Q8_0",
    ),
    "a type that is none": (head(1) + tensor((256, 2), kind=999) + bytes(1000), "x is of the unknown type 999, expected F32"),
    "a quantized vector": (head(1) + tensor((32,), kind=2) + bytes(1000), r"x is Q4_0 \[32\], expected a matrix$"),
    "no alignment": (head(0, 1) + string("general.alignment") + struct.pack("<II", 4, 0), "general.alignment is 0, expected"),
    "alignment of text": (head(0, 1) + string("general.alignment") + struct.pack("<I", 8) + string("x"), "alignment is 'x'"),
    "nothing in it": (head() + bytes(100), "general.architecture is None, expected 'llama'$"),
}


@pytest.mark.parametrize("fault", BAD)
def test_an_absurd_header_is_one_line(tmp_path, fault):
    content, expected = BAD[fault]
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", tmp_path / "m", r"m\.gguf.*" + expected)


def test_every_cut_is_noticed(tmp_path):
    """Check that a file cut off anywhere, in its header or its numbers, never becomes a model."""
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS)
    data = src.read_bytes()
    end = max(tensor.data_offset + tensor.n_bytes for tensor in library.GGUFReader(src).tensors)
    for size in [*range(1, 200, 7), *range(200, end, end // 23), end - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        refused(tmp_path / "cut.gguf", tmp_path / "m", r"cut\.gguf")


def test_a_header_longer_than_any_is_refused_unread(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(head(n_values=1) + array(0, 40 << 20))
    os.truncate(path, 41 << 20)
    refused(path, tmp_path / "m", r"its header is damaged or longer than 33,554,432 bytes: 41,943,040 bytes announced at")


def test_our_reader_agrees_with_the_library_s(tmp_path):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, "Q5_1", **VOCABULARY)
    metadata, tensors = reader.open_file(src)
    theirs = library.GGUFReader(src)
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert metadata.keys() == expected.keys()
    for key, value in metadata.items():
        found = value.tolist() if isinstance(value, np.ndarray) else value
        assert found == (pytest.approx(expected[key], rel=1e-7) if isinstance(expected[key], float) else expected[key]), key


def test_without_the_library_the_line_says_what_to_install(tmp_path, monkeypatch):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(src, tmp_path / "m", r"pip install 'npllama\[convert\]'$")


def test_a_quantized_value_that_is_not_finite_is_named(tmp_path):
    src = foreign.write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, "Q8_0")
    data = bytearray(src.read_bytes())
    offset = next(t.data_offset for t in library.GGUFReader(src).tensors if t.name == "blk.0.attn_q.weight")
    data[offset : offset + 2] = b"\x00\x7e"  # the first block's scale becomes NaN
    src.write_bytes(data)
    refused(src, tmp_path / "m", r"layers\.0\.attention\.wq\.weight: a scale of row 0 is not finite$")
    refused(src, tmp_path / "m", r"wq\.weight: the value at \[0, 0\] is nan, which is not finite$", dtype="float32")


def test_config_of_smollm2():
    """Convert the published file that NPLLAMA_SMOLLM2_GGUF names."""
    path = os.environ.get("NPLLAMA_SMOLLM2_GGUF")
    if not path:
        pytest.skip("SmolLM2's GGUF is absent: the environment variable NPLLAMA_SMOLLM2_GGUF is not set")
    source = sources.read(path, report=len)
    assert source.config == Config(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=49152, norm_eps=1e-5,
        rope_theta=1e5, rope_scaling=None, max_seq_len=8192, tied_embeddings=True,
    )  # fmt: skip
    assert source.generation["chat_format"] == "chatml"
