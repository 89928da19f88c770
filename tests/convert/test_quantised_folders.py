"""Folders whose matrices are quantised already: the same whole numbers and scales as their own libraries take out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from npllama import forward, load
from npllama.checkpoint import open_model, verify
from npllama.engine.grouped import Grouped
from npllama.engine.weights import widen
from npllama_convert.quantised_folders import unpacked

import tiny
from tiny import relative_error, uniform

foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)
safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
convert, refused = foreign.convert, foreign.refused

CONFIG = tiny.config(dim=128, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=192, n_layers=1)
PARAMS = tiny.random_params(CONFIG, seed=5)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def small_blocks(quick_conversion):
    """Blocks of a few rows."""


def write_folder(folder: Path, tensors: dict[str, np.ndarray], **settings: object) -> Path:
    foreign.write_hf(folder, CONFIG, PARAMS, **settings)
    safetensors.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def in_our_order(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same matrices under our names, queries and keys interleaved."""
    theirs = foreign.hf_tensors(CONFIG, {name: np.arange(len(x))[:, None] for name, x in PARAMS.items() if x.ndim == 2})
    names = foreign.hf_tensors(
        CONFIG,
        {name: np.array([i]) for i, name in enumerate(PARAMS)}
        | {name: np.full((len(x), 1), i) for i, (name, x) in enumerate(PARAMS.items()) if x.ndim == 2},
    )
    ours = list(PARAMS)
    out = {}
    for name, array in expected.items():
        back = np.empty_like(array)
        back[theirs[name].ravel()] = array
        out[ours[int(names[name].ravel()[0])]] = back
    return out


def assert_widens_to(folder: Path, expected: dict[str, np.ndarray], tolerance: float) -> None:
    params = open_model(folder).params
    for name, array in in_our_order(expected).items():
        assert isinstance(params[name], Grouped), name
        assert np.abs(widen(params[name]) - array).max() <= tolerance * np.abs(array).max(), name
    model = load(folder, "stored")
    wide = load(folder, "float32")
    tokens = np.arange(20)
    logits = forward(wide.params, wide.config, tokens)
    assert relative_error(forward(model.params, model.config, tokens), logits) < 5e-6
    assert verify(folder) == []


# ----------------------------------------------------------------------------------------------------------------------- MLX


def mlx_tensors(bits: int, dtype: str, group: int = 32) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What mlx saves of a quantised model, and the numbers that it takes out of that."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    kind, tensors, expected = getattr(mx, dtype), {}, {}

    def saved(x) -> np.ndarray:
        return np.array(x.view(mx.uint16)).view(foreign.ml_dtypes.bfloat16) if x.dtype == mx.bfloat16 else np.array(x)

    for name, array in foreign.hf_tensors(CONFIG, PARAMS).items():
        if array.ndim == 1:
            tensors[name] = saved(mx.array(array).astype(kind))
            continue
        parts = mx.quantize(mx.array(array).astype(kind), group_size=group, bits=bits)
        prefix = name.removesuffix(".weight")
        tensors |= {f"{prefix}.{part}": saved(x) for part, x in zip(("weight", "scales", "biases"), parts, strict=True)}
        expected[name] = np.array(mx.dequantize(*parts, group_size=group, bits=bits).astype(mx.float32))
        ones = [mx.ones_like(parts[1]).astype(mx.float32), mx.zeros_like(parts[2]).astype(mx.float32)]
        whole = np.array(mx.dequantize(parts[0], *ones, group_size=group, bits=bits))
        np.testing.assert_array_equal(unpacked(np.array(parts[0]), bits), whole)
    return tensors, expected


@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, "float16"), (4, "bfloat16"), (4, "float32"), (3, "float16"), (6, "float16"), (8, "bfloat16")]
)
def test_mlx_folders_keep_their_quantisation(tmp_path, bits, dtype):
    """Within mlx's own rounding: half a unit of the product, which is at most twice as large as any number, and of the sum."""
    tensors, expected = mlx_tensors(bits, dtype)
    src = write_folder(tmp_path / "src", tensors, quantization={"group_size": 32, "bits": bits})
    convert(src, tmp_path / "m")
    half_unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    assert_widens_to(tmp_path / "m", expected, 3 * half_unit)
    grouping = open_model(tmp_path / "m").params["layers.0.attention.wq.weight"].grouping
    assert (grouping.bits, grouping.group, grouping.scale) == (4 if bits <= 4 else 8, 32, dtype)
    convert(src, tmp_path / "wide", dtype="float32")
    for name, weight in open_model(tmp_path / "wide").params.items():
        np.testing.assert_array_equal(weight, widen(open_model(tmp_path / "m").params[name]))


def test_a_matrix_of_mlx_may_have_its_own_settings(tmp_path):
    tensors, expected = mlx_tensors(4, "float32")
    others, more = mlx_tensors(8, "float32", group=64)
    tensors |= {name: x for name, x in others.items() if name.startswith(Q_PROJ)}
    expected[f"{Q_PROJ}.weight"] = more[f"{Q_PROJ}.weight"]
    settings = {"group_size": 32, "bits": 4, Q_PROJ: {"group_size": 64, "bits": 8}}
    src = write_folder(tmp_path / "src", tensors, quantization=settings, quantization_config=settings)
    convert(src, tmp_path / "m")
    assert_widens_to(tmp_path / "m", expected, 2.0**-23)
    src = write_folder(tmp_path / "src", tensors, quantization={"group_size": 32, "bits": 4})
    refused(
        src, tmp_path / "bad", rf"{Q_PROJ}: float32 \[128, 2\] next to scales of float32, expected \[128, 8\] for \[128, 256\]"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"bits": 7, "group_size": 32},
            r"config\.json: quantization of .* is .*, expected 2 to 6 or 8 bits, and a group_size$",
        ),
        ({"bits": 4}, r"expected 2 to 6 or 8 bits, and a group_size$"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, r"expected the mode affine$"),
    ],
)
def test_what_mlx_has_besides_is_refused(tmp_path, settings, expected):
    tensors, _ = mlx_tensors(4, "float32")
    refused(write_folder(tmp_path / "src", tensors, quantization=settings), tmp_path / "m", expected)


def test_a_part_that_is_missing_is_named(tmp_path):
    tensors, _ = mlx_tensors(4, "float32")
    del tensors[f"{Q_PROJ}.biases"]
    src = write_folder(tmp_path / "src", tensors, quantization={"bits": 4, "group_size": 32})
    refused(src, tmp_path / "m", rf"{Q_PROJ}\.biases is missing, expected a matrix$")


# -------------------------------------------------------------------------------------------------------- compressed-tensors

SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed_config(**changes: object) -> dict[str, object]:
    scheme = {key: value for key, value in (SCHEME | changes).items() if value is not None}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}


def compressed_tensors(bits: int, group: int | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Any whole numbers and scales, packed by the library; the embedding and the output matrix stay as they are."""
    helpers = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    import torch

    tensors, expected = {}, {}
    for i, (name, array) in enumerate(foreign.hf_tensors(CONFIG, PARAMS).items()):
        if "proj" not in name:
            tensors[name] = array.astype(np.float16)
            continue
        limit = 1 << bits - 1
        q = torch.from_numpy(np.random.RandomState(i).randint(-limit, limit, array.shape).astype(np.int8))
        scale = uniform(i, (len(array), array.shape[1] // (group or array.shape[1])), std=0.01).astype(np.float16)
        packed = helpers.pack_to_int32(q, bits)
        np.testing.assert_array_equal(helpers.unpack_from_int32(packed, bits, q.shape), q)
        parts = {"packed": packed.numpy(), "scale": scale, "shape": np.array(array.shape, np.int64)}
        tensors |= {f"{name}_{part}": x for part, x in parts.items()}
        columns = np.repeat(scale.astype(np.float32), group or array.shape[1], axis=1)
        expected[name] = helpers.unpack_from_int32(packed, bits, q.shape).numpy().astype(np.float32) * columns
    return tensors, expected


@pytest.mark.torch
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, None)])
def test_compressed_tensors_folders_keep_their_quantisation(tmp_path, bits, group):
    tensors, expected = compressed_tensors(bits, group)
    config = compressed_config(num_bits=bits, strategy="group" if group else "channel", group_size=group)
    convert(write_folder(tmp_path / "src", tensors, quantization_config=config), tmp_path / "m")
    assert_widens_to(tmp_path / "m", expected, 0.0)
    assert open_model(tmp_path / "m").params["output.weight"].dtype == np.float16


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"symmetric": False}, r"config\.json: quantization_config: symmetric is False, expected True$"),
        ({"type": "float"}, r"type is 'float', expected int$"),
        ({"num_bits": 2}, r"num_bits is 2, expected 4 or 8$"),
        ({"actorder": "group"}, r"actorder is 'group', expected none: columns in their own order$"),
        ({"group_size": 64}, r"next to scales of float16, expected \[128, 3\] for \[128, 192\] in groups of 64$"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path, change, expected):
    tensors, _ = compressed_tensors(4, 32)
    refused(write_folder(tmp_path / "src", tensors, quantization_config=compressed_config(**change)), tmp_path / "m", expected)


@pytest.mark.torch
def test_a_stated_shape_is_held_against_the_numbers(tmp_path):
    tensors, _ = compressed_tensors(4, 32)
    tensors[f"{Q_PROJ}.weight_shape"] = np.array([128, 96], np.int64)
    src = write_folder(tmp_path / "src", tensors, quantization_config=compressed_config())
    refused(src, tmp_path / "m", rf"{Q_PROJ}\.weight_shape is \[128, 96\], expected \[128, 128\]$")


def test_numbers_of_any_bits_are_taken_out_of_words():
    words = np.random.RandomState(0).randint(0, 1 << 32, (3, 6), dtype=np.uint64).astype(np.uint32)
    for bits in (2, 3, 4, 6, 8):
        whole = [sum(int(word) << 32 * i for i, word in enumerate(row)) for row in words]
        expected = [[x >> bits * i & (1 << bits) - 1 for i in range(192 // bits)] for x in whole]
        assert unpacked(words, bits).tolist() == unpacked(tiny.byte_swapped(words), bits).tolist() == expected
