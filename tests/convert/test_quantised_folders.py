"""Test folders with quantised matrices: integers and scales equal those that their own libraries read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from npllama import forward, load
from npllama.checkpoint import open_model, verify
from npllama.engine.grouped import Grouped
from npllama.engine.weights import widen
from npllama_convert.quantised_folders import open_quantised, unpacked

import packed
import tiny
from conversions import convert, refused
from tiny import relative_error, uniform

foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)
safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

CONFIG = tiny.config(dim=128, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=192, n_layers=1, vocab_size=252)
PARAMS = tiny.random_params(CONFIG, seed=5)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def small_blocks(quick_conversion):
    """Read in blocks of a few rows."""


def write_folder(folder: Path, tensors: dict[str, np.ndarray], **settings: object) -> Path:
    foreign.write_hf(folder, CONFIG, PARAMS, **settings)
    safetensors.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def in_our_order(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the same matrices under npllama's names, queries and keys interleaved."""
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
    """Return the tensors that mlx saves for a quantised model, and the numbers that it dequantises them to."""
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
    """Compare within mlx's rounding: half a unit of the product, at most twice as large as any number, and of the sum."""
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


def test_no_rows_are_unpacked_to_none():
    assert unpacked(np.zeros((0, 4), np.uint32), 4).shape == (0, 32)


def test_words_that_hold_no_whole_number_of_numbers_are_refused():
    parts = {"w.weight": np.zeros((2, 1), np.uint32), "w.scales": np.ones((2, 5), np.float16)}
    parts["w.biases"] = parts["w.scales"]
    settings = {"quantization": {"bits": 3, "group_size": 2}}
    with pytest.raises(ValueError, match=r"^file: w\.weight is \[2, 1\], which holds no rows of 3-bit numbers$"):
        open_quantised("file", settings, parts)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"bits": 7, "group_size": 32},
            r"config\.json: quantization of .* is .*, expected 2 to 6 or 8 bits, and a group_size$",
        ),
        ({"bits": 4}, r"expected 2 to 6 or 8 bits, and a group_size$"),
        ({"bits": 4.0, "group_size": 32}, r"expected 2 to 6 or 8 bits, and a group_size$"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, r"expected the mode affine$"),
    ],
)
def test_other_settings_of_mlx_are_refused(tmp_path, settings, expected):
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
    """Pack any integers and scales with the library; the embedding and the output matrix stay unquantised."""
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
        words = helpers.pack_to_int32(q, bits)
        np.testing.assert_array_equal(helpers.unpack_from_int32(words, bits, q.shape), q)
        parts = {"packed": words.numpy(), "scale": scale, "shape": np.array(array.shape, np.int64)}
        tensors |= {f"{name}_{part}": x for part, x in parts.items()}
        columns = np.repeat(scale.astype(np.float32), group or array.shape[1], axis=1)
        expected[name] = helpers.unpack_from_int32(words, bits, q.shape).numpy().astype(np.float32) * columns
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
        ({"symmetric": None}, r"config\.json: quantization_config: symmetric is None, expected True or False$"),
        ({"symmetric": False}, r"down_proj\.weight_zero_point is missing, expected a matrix$"),
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


@pytest.mark.torch
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, None)])
def test_asymmetric_compressed_tensors_folders_keep_their_quantisation(tmp_path, bits, group):
    """Pack with the library's own compressor, scales and zero points of any values; 252 zero points end within a word."""
    library = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationScheme

    assert library.__version__
    config = compressed_config(
        num_bits=bits, strategy="group" if group else "channel", group_size=group, symmetric=False, actorder="static"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=config["config_groups"]["group_0"]["weights"])
    tensors, expected = {}, {}
    for i, (name, array) in enumerate(foreign.hf_tensors(CONFIG, PARAMS).items()):
        if array.ndim == 1 or "embed" in name:
            tensors[name] = array.astype(np.float16)
            continue
        shape, limit, random = (
            (len(array), array.shape[1] // (group or array.shape[1])),
            1 << bits - 1,
            np.random.RandomState(i),
        )
        state = {
            "weight": torch.from_numpy(array),
            "weight_scale": torch.from_numpy(uniform(i, shape, std=0.01) ** 2 + np.float32(0.001)).half().float(),
            "weight_zero_point": torch.from_numpy(random.randint(-limit, limit, shape).astype(np.int8)),
        }
        compressed = Compressor.compress(state, scheme)
        expected[name] = Compressor.decompress(compressed, scheme)["weight"].numpy()
        assert len(np.unique(expected[name])) > 100
        compressed["weight_scale"] = compressed["weight_scale"].half()
        tensors |= {f"{name[:-6]}{part}": x.numpy() for part, x in compressed.items()}
    convert(write_folder(tmp_path / "src", tensors, quantization_config=config), tmp_path / "m")
    assert_widens_to(tmp_path / "m", expected, 0.0)


# -------------------------------------------------------------------------------------------------------------- GPTQ and AWQ

Chosen = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # q [out, in], zero points and scales [out, groups]


def any_numbers(bits: int, group: int, zeros: tuple[int, int], dtype: type = np.float16) -> Chosen:
    """Draw integers, zero points between two bounds, and scales, for every matrix but the embedding."""
    out = {}
    for i, (name, array) in enumerate(foreign.hf_tensors(CONFIG, PARAMS).items()):
        if array.ndim == 1 or "embed" in name:
            continue
        random = np.random.RandomState(i)
        shape = len(array), array.shape[1] // (array.shape[1] if group == -1 else group)
        q = random.randint(0, 1 << bits, array.shape)
        out[name] = q, random.randint(zeros[0], zeros[1] + 1, shape), uniform(i, shape, std=0.01).astype(dtype)
    return out


def in_order(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.arange(q.shape[1]) // (q.shape[1] // scales.shape[1])


def folder_of(folder: Path, parts: dict[str, packed.Parts], **settings: object) -> Path:
    """Write a folder in which these matrices are packed and the others are not."""
    plain = {name: x.astype(np.float16) for name, x in foreign.hf_tensors(CONFIG, PARAMS).items() if name not in parts}
    tensors = {f"{name[:-6]}{part}": x for name, of in parts.items() for part, x in of.items()}
    return write_folder(folder, plain | tensors, quantization_config=settings)


def gptq_folder(folder: Path, chosen: Chosen, less: str = "one", **settings: object) -> Path:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32} | settings
    parts = {name: packed.gptq(*of, in_order(of[0], of[2]), settings["bits"], less) for name, of in chosen.items()}
    if settings.get("desc_act") is False:  # older files have none then
        parts = {name: {part: x for part, x in of.items() if part != "g_idx"} for name, of in parts.items()}
    return folder_of(folder, parts, **settings)


def meant(chosen: Chosen) -> dict[str, np.ndarray]:
    return {name: packed.numbers(*of, in_order(of[0], of[2])) for name, of in chosen.items()}


GPTQ = {  # bits, group, the zero points from .. to, what is subtracted from them in the file, settings
    "symmetric": (4, 32, (8, 8), "one", {}),
    "asymmetric": (4, 64, (1, 15), "one", {"checkpoint_format": "gptq", "sym": False, "desc_act": False}),
    "version 2": (4, 32, (0, 15), "none", {"checkpoint_format": "gptq_v2", "desc_act": True}),
    "by gptqmodel": (4, 32, (0, 15), "one of words", {"meta": {"quantizer": ["gptqmodel:2.1.0"]}}),
    "8 bits": (8, 32, (1, 255), "one", {}),
    "8 bits, symmetric": (8, -1, (128, 128), "none", {"format": "gptq_v2"}),
    "whole rows": (4, -1, (1, 15), "one", {}),
    "bfloat16": (4, 32, (1, 15), "one", {}),
}


@pytest.mark.parametrize("kind", GPTQ)
def test_gptq_folders_keep_their_quantisation(tmp_path, kind):
    bits, group, zeros, less, settings = GPTQ[kind]
    chosen = any_numbers(bits, group, zeros, foreign.ml_dtypes.bfloat16 if kind == "bfloat16" else np.float16)
    convert(gptq_folder(tmp_path / "src", chosen, less, bits=bits, group_size=group, **settings), tmp_path / "m")
    assert_widens_to(tmp_path / "m", meant(chosen), 0.0)
    one_zero = zeros[0] == zeros[1]
    for name in ("layers.0.attention.wq.weight", "output.weight"):  # whose last zero points fill no whole word
        grouping = open_model(tmp_path / "m").params[name].grouping
        assert (grouping.bits, grouping.offset, grouping.scale) == (bits, not one_zero, "float16" if one_zero else "float32")


@pytest.mark.parametrize(("group", "zeros"), [(32, (0, 15)), (-1, (0, 15)), (64, (8, 8))])
def test_awq_folders_keep_their_quantisation(tmp_path, group, zeros):
    chosen = {name: of for name, of in any_numbers(4, group, zeros).items() if name != "lm_head.weight"}
    parts = {name: packed.awq(*of) for name, of in chosen.items()}
    src = folder_of(tmp_path / "src", parts, quant_method="awq", bits=4, group_size=group, version="gemm", zero_point=True)
    convert(src, tmp_path / "m")
    assert_widens_to(tmp_path / "m", meant(chosen), 0.0)


def test_a_group_may_be_wider_than_the_matrix(tmp_path):
    """Read whole rows, whatever the number: one that no 64 bits hold was an OverflowError."""
    chosen = any_numbers(4, -1, (1, 15))
    convert(gptq_folder(tmp_path / "src", chosen, group_size=10**30), tmp_path / "m")
    assert_widens_to(tmp_path / "m", meant(chosen), 0.0)


def test_act_order_is_refused_with_its_reason_unless_a_dtype_is_chosen(tmp_path):
    """Test groups of scattered columns, which are refused, and permuted groups of adjacent ones, which are not."""
    chosen = any_numbers(4, 32, (1, 15))
    random = np.random.RandomState(1)
    groups = {name: random.permutation(in_order(of[0], of[2])) for name, of in chosen.items()}
    parts = {name: packed.gptq(*of, groups[name], 4) for name, of in chosen.items()}
    expected = {name: packed.numbers(*of, groups[name]) for name, of in chosen.items()}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    src = folder_of(tmp_path / "src", parts, **settings)
    refused(
        src, tmp_path / "m", r"wq\.weight is GPTQ with act-order \(g_idx scatters .* which is not stored: choose a --dtype$"
    )
    convert(src, tmp_path / "m", dtype="float32")
    params = open_model(tmp_path / "m").params
    for name, array in in_our_order(expected).items():
        np.testing.assert_array_equal(params[name], array)

    order = {name: random.permutation(of[2].shape[1]) for name, of in chosen.items()}
    parts = {name: packed.gptq(*of, np.repeat(order[name], 32), 4) for name, of in chosen.items()}
    expected = {name: packed.numbers(*of, np.repeat(order[name], 32)) for name, of in chosen.items()}
    convert(folder_of(tmp_path / "groups", parts, **settings), tmp_path / "g")
    assert_widens_to(tmp_path / "g", expected, 0.0)


def test_a_zero_point_that_could_not_be_stored_is_refused(tmp_path):
    chosen = any_numbers(4, 32, (1, 15))
    chosen["lm_head.weight"][1][3, 1] = 0
    refused(
        gptq_folder(tmp_path / "src", chosen), tmp_path / "m", r"lm_head: qzeros has a 15, a zero point of 0 less one, which"
    )


@pytest.mark.parametrize(
    ("part", "shape", "expected"),
    [
        ("qzeros", (4, 8), r"q_proj: qzeros is \[4, 8\], expected \[4, 16\]$"),
        ("scales", (2, 128), r"q_proj: scales is \[2, 128\], expected \[4, 128\]$"),
        ("g_idx", (64,), r"q_proj: g_idx is \[64\], expected \[128\]$"),
        ("g_idx", None, r"q_proj\.g_idx is missing, expected a vector$"),
        ("qweight", None, r"q_proj\.qweight is \[2, 2, 2\], expected a matrix$"),
    ],
)
def test_a_part_of_another_shape_is_named(tmp_path, part, shape, expected):
    chosen = any_numbers(4, 32, (1, 15))
    parts = {name: packed.gptq(*of, in_order(of[0], of[2]), 4) for name, of in chosen.items()}
    if shape is None and part == "g_idx":
        del parts[f"{Q_PROJ}.weight"][part]
    else:
        parts[f"{Q_PROJ}.weight"][part] = np.zeros(shape or (2, 2, 2), np.float16 if part == "scales" else np.int32)
    src = folder_of(tmp_path / "src", parts, quant_method="gptq", bits=4, group_size=32, desc_act=True)
    refused(src, tmp_path / "m", expected)


def test_groups_that_are_not_there_are_refused(tmp_path):
    chosen = any_numbers(4, 32, (1, 15))
    for beyond in (4, -1):
        parts = {name: packed.gptq(*of, in_order(of[0], of[2]), 4) for name, of in chosen.items()}
        parts[f"{Q_PROJ}.weight"]["g_idx"][5] = beyond
        src = folder_of(tmp_path / "src", parts, quant_method="gptq", bits=4, group_size=32)
        refused(src, tmp_path / "m", r"q_proj: g_idx has a group that is none, int32, expected whole numbers from 0 to 3$")


def module_of(package: str, file: str) -> ModuleType:
    """Import one file of a package whose other files need CUDA or an old transformers."""
    if (found := importlib.util.find_spec(package)) is None or not found.submodule_search_locations:
        pytest.skip("auto_gptq or awq is absent: pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.7.post3")
    spec = importlib.util.spec_from_file_location(
        f"{package}_{Path(file).stem}", Path(found.submodule_search_locations[0], file)
    )
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.torch
@pytest.mark.parametrize("bits", [4, 8])
def test_auto_gptq_packs_and_reads_as_the_helper_does(bits):
    layers = module_of("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py")
    import torch

    q, zeros, scales = any_numbers(bits, 32, (1, (1 << bits) - 1))[f"{Q_PROJ}.weight"]
    groups = np.random.RandomState(0).permutation(in_order(q, scales))
    scales = np.abs(scales) + np.float16(0.001)
    linear = torch.nn.Linear(q.shape[1], len(q), bias=False)
    linear.weight.data = torch.from_numpy(expected := packed.numbers(q, zeros, scales, groups))
    layer = layers.QuantLinear(bits, 32, q.shape[1], len(q), bias=False)
    layer.pack(linear, *(torch.from_numpy(x.astype(np.float32)) for x in (scales, zeros)), torch.from_numpy(groups))
    for name, array in packed.gptq(q, zeros, scales, groups, bits).items():
        np.testing.assert_array_equal(getattr(layer, name).numpy(), array)
    np.testing.assert_array_equal(layer(torch.eye(q.shape[1])).numpy(), expected.T)


@pytest.mark.torch
def test_autoawq_reads_what_the_helper_packs():
    utils = module_of("awq", "utils/packing_utils.py")
    import torch

    q, zeros, scales = any_numbers(4, 32, (0, 15))[f"{Q_PROJ}.weight"]
    parts = [torch.from_numpy(np.ascontiguousarray(x)) for x in packed.awq(q, zeros, scales.astype(np.float32)).values()]
    wide = utils.dequantize_gemm(*parts, 4, 32).numpy()
    np.testing.assert_array_equal(wide.T, packed.numbers(q, zeros, scales, in_order(q, scales)))


def test_numbers_of_any_bits_are_taken_out_of_words():
    words = np.random.RandomState(0).randint(0, 1 << 32, (3, 6), dtype=np.uint64).astype(np.uint32)
    for bits in (2, 3, 4, 6, 8):
        whole = [sum(int(word) << 32 * i for i, word in enumerate(row)) for row in words]
        expected = [[x >> bits * i & (1 << bits) - 1 for i in range(192 // bits)] for x in whole]
        assert unpacked(words, bits).tolist() == unpacked(tiny.byte_swapped(words), bits).tolist() == expected
