"""int8: each number within half a step of its row, the same model however it is stored, and one clear line for every fault."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from npllama import checkpoint, forward, generate, generate_batch, parameter_shapes
from npllama.checkpoint import CheckpointError, load, open_model, reading, takes_int8, verify, writing
from npllama.cli import main
from npllama.engine.linear import Int8, linear, tile_size, to_bfloat16, to_int8, widen
from npllama.engine.threads import n_threads
from npllama.evaluate.perplexity import compare
from npllama.golden.precision import Precision

import tiny
from conversions import convert
from tiny import relative_error

CONFIG = tiny.config(n_layers=1)
NAME = "layers.0.attention.wq.weight"
QUANTIZED = [name for name in parameter_shapes(CONFIG) if "norm" not in name and name != "tok_embeddings.weight"]


@pytest.fixture(autouse=True)
def small_blocks(quick_conversion):
    """Make conversion quantise blocks of a few rows."""


def dtypes(config, rest: str = "float32") -> dict[str, str]:
    return {name: "int8" if takes_int8(name) else rest for name in parameter_shapes(config)}


def write(path: Path, config=CONFIG, rest: str = "float32", changes=None, **options) -> dict[str, np.ndarray]:
    params = tiny.random_params(config, seed=1) | (changes or {})
    with checkpoint.create(path, config, dtypes(config, rest), {"kind": "test"}, **options) as writer:
        for name, array in params.items():
            writer.add(name, array)
    return params


def assert_int8(found: Int8, expected: Int8) -> None:
    assert isinstance(found, Int8)
    assert (found.values.dtype, found.scale.dtype) == (np.int8, np.float32)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.scale, expected.scale)


# ------------------------------------------------------------------------------------------------------------- quantization


def test_known_answers():
    found = to_int8(np.array([[127.0, -3.2, 0.5, 1.5, -2.5, 2.4999], [0, 0, 0, 0, 0, 0], [-254, 127, 0, 2, 1, -1.01]]))
    assert found.values.tolist() == [[127, -3, 0, 2, -2, 2], [0] * 6, [-127, 64, 0, 1, 0, -1]]  # ties to even
    np.testing.assert_array_equal(found.scale, np.array([1, 0, 2], np.float32))
    assert not widen(found)[1].any()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("power", [-4, 0, 3])
def test_no_number_is_off_by_more_than_half_a_step_of_its_row(dtype, power):
    x = (tiny.uniform(3, (60, 83)) * 10.0**power * 2.0 ** (np.arange(60)[:, None] % 7 - 5)).astype(dtype)
    found = to_int8(x)
    largest = np.abs(x.astype(np.float64)).max(axis=1)
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-7)
    np.testing.assert_array_equal(np.abs(found.values).max(axis=1), 127)
    error = np.abs(widen(found).astype(np.float64) - x)
    assert (error <= (0.5 + 1e-5) * found.scale[:, None]).all()
    assert (error >= 0.4 * found.scale[:, None]).any()  # the bound is near, so that it can be missed


def test_the_smallest_and_largest_numbers_stay_finite():
    rows = [1e-45, 2.5e-43, 3e-44, 1e-38, 1e38, writing.INT8_LIMIT]
    x = np.array(rows, np.float32)[:, None] * np.array([[1, -1, 0.5]], np.float32)
    wide = widen(to_int8(x))
    assert np.isfinite(wide).all()
    half_step = np.abs(x[:, :1].astype(np.float64)) / 254 * (1 + 1e-5)
    assert (np.abs(wide - x) <= half_step + 127 * 0.7e-45).all()  # a scale is off by half of the smallest float32 at most


@pytest.mark.torch
def test_the_values_and_scales_are_torch_s():
    import torch

    x = tiny.uniform(4, (200, 300), std=0.1)
    x[:, :5] = (np.arange(200)[:, None] + np.array([0.5, 1.5, 2.5, -3.5, 127])) / 127 * 0.25  # many near ties
    found = to_int8(x)
    exact = torch.from_numpy(x).double()
    scale = (exact.abs().amax(dim=1) / 127).float()
    np.testing.assert_array_equal(found.scale, scale.numpy())
    np.testing.assert_array_equal(found.values, torch.round(exact / scale.double()[:, None]).to(torch.int8).numpy())
    # torch's own operator multiplies by the reciprocal in float32, which can fall to the other side of a tie.
    operator = torch.fake_quantize_per_channel_affine
    theirs = operator(torch.from_numpy(x), scale, torch.zeros(200, dtype=torch.int32), 0, -127, 127).numpy()
    off = np.abs(theirs - widen(found)) / found.scale[:, None]
    assert off.max() < 1 + 1e-5
    assert np.mean(off > 1e-5) < 0.01


# ------------------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("n_tiles", [1, 5])
@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 3, 96)])
def test_the_product_is_that_of_the_widened_matrix(shape, n_tiles, monkeypatch):
    monkeypatch.setattr("npllama.engine.linear.tile_size", lambda n: -(-253 // n_tiles) * 96)
    x, weight = tiny.uniform(1, shape), to_int8(tiny.uniform(2, (253, 96)) * np.arange(253)[:, None])
    found = linear(x, weight)
    assert found.dtype == np.float32
    assert relative_error(found, x.astype(np.float64) @ widen(weight).astype(np.float64).T) < 2e-6


def test_the_matrix_is_never_widened_whole():
    weight = Int8(np.ones((40000, 1000), np.int8), np.ones(40000, np.float32))
    x = np.ones((1, 1000), np.float32)
    tracemalloc.start()
    linear(x, weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * tile_size(n_threads()) * (n_threads() + 1) < 4 * weight.size / 4


# ------------------------------------------------------------------------------------------------------ the model directory


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
def test_a_directory_holds_what_the_whole_matrices_quantize_to(tmp_path, source):
    params = tiny.random_params(CONFIG, seed=1)
    params = {name: to_bfloat16(x) if source == "bfloat16" else x.astype(source) for name, x in params.items()}
    rest = "float32" if source == "float64" else source
    write(tmp_path / "m", rest=rest, changes=params)
    found = open_model(tmp_path / "m")
    assert sorted(name for name, array in found.params.items() if isinstance(array, Int8)) == sorted(QUANTIZED)
    assert found.manifest["dtype"] == "int8"
    for name, array in params.items():
        if name in QUANTIZED:
            assert_int8(found.params[name], to_int8(widen(array)))
        else:
            np.testing.assert_array_equal(found.params[name], array.astype(np.float32) if source == "float64" else array)
    assert verify(tmp_path / "m") == []


def test_any_tool_opens_the_values_and_their_scale(tmp_path):
    params = write(tmp_path / "m")
    values, scale = (np.load(tmp_path / "m" / f"{NAME}{end}.npy", mmap_mode="r") for end in ("", ".scale"))
    assert_int8(Int8(values, scale), to_int8(params[NAME]))
    entry = json.loads((tmp_path / "m" / "manifest.json").read_text())["tensors"][NAME]
    assert (entry["dtype"], entry["shape"]) == ("int8", [96, 96])
    for part, file in ((entry, f"{NAME}.npy"), (entry["scale"], f"{NAME}.scale.npy")):
        assert part["file"] == file
        assert part["bytes"] == (tmp_path / "m" / file).stat().st_size
        assert part["sha256"] == checkpoint.sha256(tmp_path / "m" / file)


@pytest.mark.parametrize("dtype", ["stored", "float32", "float64", "auto"])
def test_dtypes_of_loading(tmp_path, dtype, monkeypatch):
    params = write(tmp_path / "m", rest="bfloat16")
    monkeypatch.setattr(reading, "available_memory", lambda: 0)  # so that auto means stored
    for name, array in load(tmp_path / "m", dtype).params.items():
        if name not in QUANTIZED:
            continue
        if dtype in ("stored", "auto"):
            assert_int8(array, to_int8(params[name]))
            assert isinstance(array.values.base, np.memmap)
            assert isinstance(array.scale.base, np.memmap)
        else:
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, widen(to_int8(params[name])).astype(dtype))


@pytest.mark.parametrize(
    ("value", "source", "why"),
    [
        (np.nan, "float32", "which is not finite"),
        (-np.inf, "float16", "which is not finite"),
        (1e39, "float64", "too large for int8"),
        (np.finfo(np.float32).max, "float32", "too large for int8"),  # 127 times its scale is infinite
    ],
)
def test_what_has_no_scale_is_refused_by_name_and_value(tmp_path, value, source, why):
    array = np.ones((96, 96), source)
    array[90, 3] = value
    with pytest.raises(CheckpointError, match=rf"^{NAME}: the value at \[90, 3\] is .*, {why}$") as error:
        write(tmp_path / "m", changes={NAME: array})
    assert str(array[90, 3]) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "norm.weight", "layers.0.ffn_norm.weight"])
def test_embedding_and_norms_are_not_quantized(tmp_path, name):
    with (
        pytest.raises(CheckpointError, match=rf"^{name} is not quantized: its dtype is int8, expected float32, "),
        checkpoint.create(tmp_path / "m", CONFIG, dtypes(CONFIG) | {name: "int8"}, {}),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_an_int8_model_is_replaced_by_force_whole(tmp_path):
    write(tmp_path / "m")
    write(tmp_path / "m", force=True)
    with checkpoint.create(tmp_path / "m", CONFIG, "float32", {}, force=True) as writer:
        for name, array in tiny.random_params(CONFIG, seed=1).items():
            writer.add(name, array)
    assert not list((tmp_path / "m").glob("*.scale.npy"))


def edit(folder: Path, name: str = NAME, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"][name] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_scale(folder: Path, **changes) -> None:
    scale = json.loads((folder / "manifest.json").read_text())["tensors"][NAME]["scale"]
    edit(folder, scale=scale | changes)


def replace_scale(folder: Path, array: np.ndarray) -> None:
    file = folder / f"{NAME}.scale.npy"
    np.save(file, array)
    edit_scale(folder, bytes=file.stat().st_size)


BAD = {
    "no scale said": (lambda m: edit(m, scale=None), rf"'{NAME}': scale: expected an object with file, bytes, sha256$"),
    "odd scale": (lambda m: edit_scale(m, bytes="9"), rf"'{NAME}': scale: expected an object with file, bytes, sha256$"),
    "traversal": (lambda m: edit_scale(m, file="../x.npy"), rf"'{NAME}' names a file outside the directory$"),
    "no scale": (lambda m: (m / f"{NAME}.scale.npy").unlink(), rf"{NAME}\.scale\.npy is missing$"),
    "truncated": (lambda m: os.truncate(m / f"{NAME}.scale.npy", 511), r"\.scale\.npy is 511 bytes, expected 512$"),
    "other shape": (
        lambda m: replace_scale(m, np.ones((96, 1), np.float32)),
        r"\.scale\.npy holds float32 \[96, 1\], expected float32 \[96\]$",
    ),
    "other dtype": (
        lambda m: replace_scale(m, np.ones(96)),
        r"\.scale\.npy holds float64 \[96\], expected float32 \[96\]$",
    ),
    "values of another dtype": (lambda m: edit(m, dtype="float32"), rf"{NAME}\.npy holds int8 \[96, 96\], expected float32"),
    "int8 norm": (
        lambda m: edit(m, "norm.weight", dtype="int8", scale={"file": "s.npy", "bytes": 1, "sha256": ""}),
        r"norm\.weight has dtype 'int8', expected float32, float16, bfloat16$",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_has_its_line(tmp_path, fault):
    spoil, expected = BAD[fault]
    write(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(CheckpointError, match=expected) as error:
        open_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_verify_hashes_the_scales_too(tmp_path):
    write(tmp_path / "m")
    file = tmp_path / "m" / f"{NAME}.scale.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    open_model(tmp_path / "m")
    assert [problem.split(":")[0] for problem in verify(tmp_path / "m")] == [f"{file} is altered"]


# ----------------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_stored_and_widened_are_the_same_model_and_near_the_original(tmp_path, name, record_property):
    config = tiny.CONFIGS[name]
    params = write(tmp_path / "m", config)
    tokens = tiny.random_tokens(config, seed=2, shape=(2, 9))
    stored, wide = load(tmp_path / "m", "stored").params, load(tmp_path / "m", "float32").params
    expected = forward(wide, config, tokens)
    found = forward(stored, config, tokens)
    assert found.dtype == expected.dtype == np.float32
    assert relative_error(found, expected) < 2e-6
    for key, array in params.items():
        step = np.abs(array).max(axis=-1, keepdims=True) / 127 if takes_int8(key) else 0
        assert (np.abs(wide[key] - array) <= step * (0.5 + 1e-5)).all(), key
    error = relative_error(expected, forward(params, config, tokens))
    record_property("relative_error", error)
    assert 1e-4 < error < 0.05  # ten matrices in a row, each off by at most 1/254 of its rows' largest


def test_decoding_and_batches_are_the_whole_pass(tmp_path):
    write(tmp_path / "m")
    model = load(tmp_path / "m", "stored")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    ids = list(prompts[0])
    for _ in range(8):
        ids.append(int(forward(model.params, model.config, ids, last_only=True)[0].argmax()))
    alone = [list(generate(model, prompt, max_tokens=8, temperature=0.0)) for prompt in prompts]
    assert alone[0] == ids[3:]
    assert [list(row) for row in zip(*generate_batch(model, prompts, max_tokens=8), strict=True)] == alone


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16"])
def test_every_precision_computes_with_the_widened_numbers(tmp_path, name):
    write(tmp_path / "m")
    stored = load(tmp_path / "m", "stored").params
    wide = {name: widen(weight) for name, weight in stored.items()}  # in the same order in memory, so to the bit
    tokens = tiny.random_tokens(CONFIG, seed=2, shape=9)
    found, expected = (Precision(name).forward(params, CONFIG, tokens) for params in (stored, wide))
    assert found.dtype == expected.dtype
    if name == "float32":
        np.testing.assert_array_equal(found, forward(stored, CONFIG, tokens))
        assert relative_error(found, expected) < 2e-6
    else:
        np.testing.assert_array_equal(found, expected)


def test_trace_golden_and_info_take_an_int8_model(tmp_path, capsys):
    write(tmp_path / "m")
    model = str(tmp_path / "m")
    for command in (["trace", "-m", model, "--precision", "float64"], ["golden", model]):
        out = tmp_path / command[0]
        assert main([*command, "--tokens", "1,2,3", "--out", str(out)]) == 0
        assert (out / "trace.json").is_file()
    capsys.readouterr()
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert "int8 (8 tensors)" in out
    assert f"{sum(file.stat().st_size for file in (tmp_path / 'm').glob('*.npy')):,} bytes" in out


# --------------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", [pytest.param("meta", marks=pytest.mark.torch), "huggingface", "gguf", "llama2.c"])
def test_convert_quantizes_what_every_reader_reads(tmp_path, kind):
    foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)
    config = tiny.config(n_layers=1, vocab_size=132)  # which two shards divide
    params = tiny.random_params(config, seed=5)
    src = tmp_path / "src"
    if kind == "meta":
        from to_meta import to_meta

        with checkpoint.create(tmp_path / "plain", config, "bfloat16", {}) as writer:
            for name, array in params.items():
                writer.add(name, array)
        to_meta(tmp_path / "plain", src, shards=2)
    elif kind == "huggingface":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        foreign.write_hf(src, config, params, "bfloat16")
    elif kind == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
        foreign.write_gguf(src, config, params, "Q8_0")
    else:
        foreign.write_llama2c(src, config, params)
    convert(src, tmp_path / "auto")
    assert main(["convert", str(src), str(tmp_path / "m"), "--dtype", "int8"]) == 0
    auto, found = open_model(tmp_path / "auto").params, open_model(tmp_path / "m").params
    for name, array in auto.items():
        if name in QUANTIZED:
            assert_int8(found[name], to_int8(widen(array)))
        else:
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(widen(found[name]), widen(array))
    assert verify(tmp_path / "m") == []


@pytest.mark.torch
def test_the_way_back_to_torch_has_the_widened_numbers(tmp_path):
    import torch

    from to_meta import to_meta

    params = write(tmp_path / "m")
    to_meta(tmp_path / "m", tmp_path / "meta")
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    np.testing.assert_array_equal(state[NAME].numpy(), widen(to_int8(params[NAME])))


SPEECH = """HAMLET:
To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles,
And by opposing end them. To die, to sleep,
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to: 'tis a consummation
Devoutly to be wish'd. To die, to sleep;
To sleep, perchance to dream: ay, there's the rub;
For in that sleep of death what dreams may come,
When we have shuffled off this mortal coil,
Must give us pause: there's the respect
That makes calamity of so long life;
"""


def test_a_trained_model_predicts_as_well(tmp_path):
    demo = load(dtype="float32")
    with checkpoint.create(tmp_path / "m", demo.config, dtypes(demo.config), {}) as writer:
        for name, array in demo.params.items():
            writer.add(name, array)
    ids = demo.tokenizer.encode(SPEECH)
    comparison = compare(load(tmp_path / "m", "stored"), demo, ids, context=64)
    assert len(comparison.kl) >= 90
    assert abs(comparison.model.value / comparison.base.value - 1) < 0.01
    assert 0 < np.mean(comparison.kl) < 2e-4
    assert np.mean(comparison.same_top) > 0.95
