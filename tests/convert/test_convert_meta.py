"""Test Meta's torch checkpoints: however they are split and stored, the bits are the same; each fault has a clear message."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="torch is not installed")

from npllama import checkpoint, n_parameters  # noqa: E402
from npllama.checkpoint import load, open_model, verify, writing  # noqa: E402
from npllama_convert import meta  # noqa: E402

import tiny  # noqa: E402
from conversions import convert, refused  # noqa: E402
from to_meta import to_meta, to_params  # noqa: E402

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = ("wo", "w2")  # split along their inputs; stated independently of to_meta.py, which it checks
CONFIG = tiny.config(n_heads=4, n_kv_heads=4, head_dim=24, ffn_dim=256, vocab_size=132)
PARAMS = {
    "dim": 96,
    "n_layers": 2,
    "n_heads": 4,
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "vocab_size": -1,
    "max_seq_len": 512,
    "rope_theta": 10000.0,
    "n_kv_heads": 4,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Read in blocks of a few rows, which end anywhere within a shard."""
    monkeypatch.setattr(writing, "BLOCK_BYTES", 1500)


def tensors_of(config=CONFIG, dtype="float32") -> dict:
    return {name: torch.from_numpy(array).to(TORCH[dtype]) for name, array in tiny.random_params(config, seed=3).items()}


def split(tensors: dict, n: int, embedding_axis: int) -> list[dict]:
    shards = [{} for _ in range(n)]
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            pieces = [tensor] * n
        elif name == "tok_embeddings.weight":
            pieces = tensor.chunk(n, embedding_axis)
        else:
            pieces = tensor.chunk(n, 1 if name.split(".")[-2] in COLUMNS else 0)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    return shards


def save(folder: Path, shards: list[dict], params=PARAMS) -> Path:
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def bits(tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def assert_same(folder: Path, tensors: dict) -> None:
    params = open_model(folder).params
    assert set(params) == set(tensors)
    for name, tensor in tensors.items():
        expected = bits(tensor)
        assert params[name].dtype == expected.dtype
        assert np.array_equal(params[name], expected), name


# ---------------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_shards_are_joined_bit_for_bit(tmp_path, n_shards, embedding_axis, dtype):
    tensors = tensors_of(dtype=dtype)
    src = save(tmp_path / "src", split(tensors, n_shards, embedding_axis))
    convert(src, tmp_path / "m")
    assert_same(tmp_path / "m", tensors)
    assert open_model(tmp_path / "m").config == CONFIG
    assert verify(tmp_path / "m") == []


def test_more_shards_than_ten_are_in_the_order_of_their_numbers(tmp_path):
    config = dataclasses.replace(CONFIG, n_heads=12, n_kv_heads=12, head_dim=8, ffn_dim=240)
    params = PARAMS | {"n_heads": 12, "n_kv_heads": 12, "hidden_dim": 240}
    tensors = tensors_of(config)
    convert(save(tmp_path / "src", split(tensors, 12, 0), params), tmp_path / "m")
    assert_same(tmp_path / "m", tensors)


@pytest.mark.parametrize("stored", TORCH)
@pytest.mark.parametrize("wanted", TORCH)
def test_other_dtypes_are_rounded_as_torch_rounds(tmp_path, stored, wanted):
    tensors = tensors_of(dtype=stored)
    convert(save(tmp_path / "src", split(tensors, 2, 1)), tmp_path / "m", dtype=wanted)
    assert_same(tmp_path / "m", {name: tensor.to(TORCH[wanted]) for name, tensor in tensors.items()})


def test_auto_keeps_each_tensors_own_dtype(tmp_path):
    tensors = tensors_of(dtype="bfloat16")
    tensors["norm.weight"] = tensors["norm.weight"].float() * 1.001
    convert(save(tmp_path / "src", split(tensors, 2, 1)), tmp_path / "m")
    assert_same(tmp_path / "m", tensors)
    assert open_model(tmp_path / "m").manifest["dtype"] == "bfloat16"


def test_the_old_format_of_torch_is_read_with_a_word(tmp_path):
    tensors = tensors_of()
    src = save(tmp_path / "src", [tensors])
    torch.save(tensors, src / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    assert any("old format" in line for line in convert(src, tmp_path / "m"))
    assert_same(tmp_path / "m", tensors)


@pytest.mark.parametrize("config", ["llama1", "grouped", "one_kv_head", "odd_ffn", "narrow_heads", "llama3.1", "llama3.2"])
def test_there_and_back_through_export(tmp_path, config):
    config = tiny.CONFIGS[config]
    with checkpoint.create(tmp_path / "m", config, "bfloat16", {}, generation={"temperature": 0.5, "top_p": 0.9}) as writer:
        for name, array in tiny.random_params(config, seed=4).items():
            writer.add(name, array)
    to_meta(tmp_path / "m", tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "again", rope_factor=config.rope_scaling and config.rope_scaling.factor)
    first, again = open_model(tmp_path / "m"), open_model(tmp_path / "again")
    assert first.manifest["tensors"] == again.manifest["tensors"]
    assert first.config == again.config
    assert (again.generation["temperature"], again.generation["top_p"]) == (0.5, 0.9)


@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_export_splits_as_meta_does(tmp_path, embedding_axis):
    tensors = tensors_of(dtype="bfloat16")
    convert(save(tmp_path / "src", [tensors]), tmp_path / "m")
    to_meta(tmp_path / "m", tmp_path / "meta", shards=2, embedding_axis=embedding_axis)
    for i, shard in enumerate(split(tensors, 2, embedding_axis)):
        exported = torch.load(tmp_path / "meta" / f"consolidated.{i:02d}.pth", weights_only=True)
        assert set(exported) == set(shard)
        assert all(torch.equal(exported[name], shard[name]) for name in shard)
    assert meta.resolve(to_params(CONFIG), report=len) == CONFIG


# ------------------------------------------------------------------------------------------------ what is left out or inferred


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("how", ["absent", "equal", "different"])
def test_tied_embeddings_are_stored_once(tmp_path, how, embedding_axis, n_shards):
    tensors = tensors_of(dtype="bfloat16")
    if how == "absent":
        del tensors["output.weight"]
    else:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    if how == "different":
        tensors["output.weight"][-1, -1] *= 1.01  # in the last block
    lines = convert(save(tmp_path / "src", split(tensors, n_shards, embedding_axis)), tmp_path / "m")
    model = open_model(tmp_path / "m")
    assert model.config.tied_embeddings == (how != "different")
    assert ("output.weight" in model.params) == (how == "different")
    assert any(line.startswith("tied embeddings") for line in lines) == (how != "different")
    if how != "different":
        tensors.pop("output.weight", None)
    assert_same(tmp_path / "m", tensors)


def test_zeros_of_both_signs_are_not_tied(tmp_path):
    tensors = tensors_of()
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    tensors["tok_embeddings.weight"][5, 5], tensors["output.weight"][5, 5] = 0.0, -0.0
    convert(save(tmp_path / "src", [tensors]), tmp_path / "m")
    assert not open_model(tmp_path / "m").config.tied_embeddings


def test_zero_biases_are_left_out_of_joined_shards_and_told_once(tmp_path):
    tensors = tensors_of()
    shards = split(tensors, 2, 0)
    for shard in shards:
        shard |= {f"layers.{i}.attention.wq.bias": torch.zeros(48) for i in range(2)}
    lines = convert(save(tmp_path / "src", shards), tmp_path / "m")
    assert [line for line in lines if line.startswith("left out")] == ["left out: 2 biases, all zero"]
    assert_same(tmp_path / "m", tensors)


def test_buffers_are_left_out_and_named(tmp_path):
    tensors = tensors_of()
    buffers = {"rope.freqs": torch.ones(12), "freqs_cis": torch.ones(3, 4, dtype=torch.complex64)}
    buffers |= {f"layers.{i}.attention.inner_attention.rope.freqs": torch.ones(12) for i in range(2)}
    lines = convert(save(tmp_path / "src", [tensors | buffers]), tmp_path / "m")
    line = "left out, not parameters: freqs_cis, layers.N.attention.inner_attention.rope.freqs, rope.freqs"
    assert line in lines
    assert_same(tmp_path / "m", tensors)


def test_what_is_inferred_is_printed(tmp_path):
    params = {key: PARAMS[key] for key in ("dim", "n_layers", "n_heads", "multiple_of", "vocab_size")} | {"norm_eps": 1e-6}
    lines = convert(save(tmp_path / "src", [tensors_of()], params), tmp_path / "m")
    assert lines[:-1] == [
        "n_kv_heads: 4 (inferred: as n_heads)",
        "rope_theta: 10000 (inferred: the only one before Code Llama and Llama 3)",
        "vocab_size: 132 (from the weights)",
        "max_seq_len: 2048 (inferred: LLaMA 1)",
        "no tokenizer: the model takes and gives token ids only",
    ]
    assert f"{n_parameters(CONFIG):,} parameters" in lines[-1]
    config = open_model(tmp_path / "m").config
    assert config == dataclasses.replace(CONFIG, norm_eps=1e-6, max_seq_len=2048)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_eps": 1e-5}, 4096),
        ({"rope_theta": 500000.0}, 8192),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072),
        ({"rope_theta": 1e6, "max_seq_len": 16384}, 16384),
    ],
)
def test_context_length_by_family(changes, expected):
    params = {key: value for key, value in PARAMS.items() if key != "max_seq_len"} | changes
    assert meta.resolve(params, vocab_size=132, report=len).max_seq_len == expected


def test_rope_factor_is_stored_printed_and_overridden(tmp_path):
    src = save(tmp_path / "src", [tensors_of()], PARAMS | {"use_scaled_rope": True, "rope_theta": 5e5})
    assert "rope_scaling: factor 8 (inferred: Llama 3.1 and 3.3)" in convert(src, tmp_path / "m8")
    assert "rope_scaling: factor 32 (as given)" in convert(src, tmp_path / "m32", rope_factor=32)
    assert open_model(tmp_path / "m8").config.rope_scaling == tiny.LLAMA_3_1
    assert open_model(tmp_path / "m32").config.rope_scaling == tiny.LLAMA_3_2


def test_sources_are_in_the_manifest(tmp_path):
    src = save(tmp_path / "src", split(tensors_of(), 2, 1))
    convert(src, tmp_path / "m")
    source = open_model(tmp_path / "m").manifest["source"]
    assert source["kind"] == "meta"
    assert set(source["files"]) == {"consolidated.00.pth", "consolidated.01.pth", "params.json"}
    for name, entry in source["files"].items():
        data = (src / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_recommended_settings_are_taken_along(tmp_path):
    src = save(tmp_path / "src", [tensors_of()])
    (src / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": true}')
    convert(src, tmp_path / "m")
    assert open_model(tmp_path / "m").generation == {"chat_format": None, "system": None, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ('{"top_p": 0}', "top_p is 0, expected a number above 0 and up to 1"),
        ('{"top_p": 1.5}', "top_p is 1.5, expected a number above 0 and up to 1"),
        ('{"temperature": "0.7"}', "temperature is '0.7', expected a number from 0"),
        ('{"temperature": NaN}', "temperature is nan, expected a number from 0"),
        ('{"temperature": 1' + "0" * 400 + "}", "temperature is inf, expected a number from 0"),
        ('{"temperature": 1' + "0" * 90 + "}", f"temperature is 1{'0' * 76}..., expected a number from 0"),
        ('{"eos_token_id": -1}', "eos_token_id is -1, expected 0 to 131"),
        ('{"eos_token_id": [3, 132]}', "eos_token_id is 132, expected 0 to 131"),
    ],
)
def test_recommended_settings_that_mean_nothing_are_left_out(tmp_path, values, message):
    src = save(tmp_path / "src", [tensors_of()])
    (src / "generation_config.json").write_text(values)
    lines = convert(src, tmp_path / "m")
    assert [line for line in lines if "left out" in line] == [f"{src / 'generation_config.json'}: {message}: left out"]
    assert set(open_model(tmp_path / "m").generation.values()) == {None}


# ---------------------------------------------------------------------------------------------------------------- each its line


WITNESS = Path(tempfile.gettempdir()) / f"npllama-was-here-{os.getpid()}"


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(WITNESS))}",)


@pytest.fixture
def _no_code_runs():
    yield
    ran = WITNESS.exists()
    WITNESS.unlink(missing_ok=True)
    assert not ran


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_(name, tensor):
    return lambda tensors: tensors | {name: tensor}


WQ0, WQ, W1 = "layers.0.attention.wq.weight", "layers.1.attention.wq.weight", "layers.0.feed_forward.w1.weight"
BAD_TENSORS = {
    "missing": (without(WQ), rf"^the shards: {WQ} is missing$"),
    "missing and needed early": (without(W1), rf"^{W1} is missing$"),
    "no embedding": (without("tok_embeddings.weight"), r"^tok_embeddings\.weight is missing$"),
    "extra": (
        with_("layers.1.attention.wq.bias", torch.ones(96, 1)),
        r"^the shards: layers\.1\.attention\.wq\.bias: Llama has no biases",
    ),
    "extra layer": (with_("layers.2.attention.wq.weight", torch.ones(96, 96)), r"n_layers is 2, but the shards have 3 layers$"),
    "misshapen": (with_(WQ, torch.ones(96, 95)), rf"^{WQ} is \[96, 95\] in 1 shard, expected \[96, 96\] in all$"),
    "no rows": (with_(WQ0, torch.ones(0, 96)), rf"^{WQ0} is \[0, 96\] in 1 shard, expected \[96, 96\] in all$"),
    "three dimensions": (with_(WQ, torch.ones(1, 96, 96)), rf"^{WQ} is \[1, 96, 96\], expected 2 dimensions$"),
    "no dimensions": (with_("norm.weight", torch.tensor(1.0)), r"^norm\.weight is \[\], expected 1 dimensions$"),
    "NaN": (with_(WQ, torch.full((96, 96), torch.nan)), rf"^{WQ}: the value at \[0, 0\] is nan, which is not finite$"),
    "integers": (
        with_(WQ, torch.ones(96, 96, dtype=torch.int8)),
        rf"{WQ} is torch\.int8, expected bfloat16, float16 or float32$",
    ),
    "float64": (
        with_(WQ, torch.ones(96, 96, dtype=torch.float64)),
        rf"^{WQ} is float64, which is not stored: choose a --dtype$",
    ),
    "sparse": (with_(WQ, torch.eye(96).to_sparse()), rf"{WQ} is torch\.sparse_coo on cpu, expected a dense tensor$"),
    "on no device": (
        with_(WQ, torch.ones(96, 96, device="meta")),
        rf"{WQ} is torch\.strided on meta, expected a dense tensor$",
    ),
    "one number for all": (
        with_(WQ, torch.ones(1).expand(96, 96)),
        rf"00\.pth: {WQ} is 36,864 bytes, but its storage has 4: expected every number once$",
    ),
    "rows that overlap": (
        with_(WQ, torch.ones(191).as_strided((96, 96), (1, 1))),
        rf"00\.pth: {WQ} is 36,864 bytes, but its storage has 764: expected every number once$",
    ),
    "negated": (
        with_(WQ, torch.ones(96, 96, dtype=torch.complex64).conj().imag),
        rf"00\.pth: {WQ} is negated or conjugated when it is read, expected its plain numbers$",
    ),
    "conjugated": (
        with_(WQ, torch.ones(96, 96, dtype=torch.complex64).conj()),
        rf"00\.pth: {WQ} is negated or conjugated when it is read, expected its plain numbers$",
    ),
    "not a tensor": (with_("note", "hello"), r"00\.pth: 'note' is str, expected tensors by name$"),
    "nested": (lambda tensors: {"weights": tensors}, r"00\.pth: 'weights' is dict, expected tensors by name$"),
    "a list": (lambda tensors: list(tensors.values()), r"00\.pth holds list, expected tensors by name$"),
    "code": (lambda tensors: tensors | {"x": Evil()}, r"plain tensors: loading it would run \w+\.system, which is refused$"),
}


@pytest.mark.usefixtures("_no_code_runs")
@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_a_bad_tensor_is_named(tmp_path, fault):
    spoil, expected = BAD_TENSORS[fault]
    refused(save(tmp_path / "src", [spoil(tensors_of())]), tmp_path / "m", expected)


def with_pickle(data: bytes, content: bytes) -> bytes:
    """Return the same zip file with its pickle replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


BAD_FILES = {
    "empty": (lambda data: b"", r"00\.pth is empty$"),
    "half": (lambda data: data[: len(data) // 2], r"00\.pth is not a torch checkpoint of plain tensors: .*central directory"),
    "all but the end": (lambda data: data[:-5], r"00\.pth is not a torch checkpoint of plain tensors: .*central directory"),
    "text": (lambda data: b"hello world, this is no model\n" * 50, r"plain tensors: its content can't be read$"),
    "a bare pickle": (
        lambda data: pickle.dumps(Evil(), protocol=2),
        r"plain tensors: loading it would run \w+\.system, which is",
    ),
    "a long name in a bare pickle": (
        lambda data: b"\x80\x02c" + b"a" * 10**6 + b"\nb\n.",
        r"00\.pth is not a torch checkpoint of plain tensors: it names 'aaaa",
    ),
    "a long name in a zip": (
        lambda data: with_pickle(data, b"\x80\x02cos\n" + b"a" * 10**6 + b"\n."),
        r"00\.pth is not a torch checkpoint of plain tensors: it names 'os aaaa",
    ),
    "zeros in the middle": (
        lambda data: data[:100] + bytes(3000) + data[3100:],
        r"00\.pth is not a torch checkpoint of plain tensors: ",
    ),
}


@pytest.mark.usefixtures("_no_code_runs")
@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, fault):
    spoil, expected = BAD_FILES[fault]
    src = save(tmp_path / "src", [tensors_of()])
    file = src / "consolidated.00.pth"
    file.write_bytes(spoil(file.read_bytes()))
    refused(src, tmp_path / "m", expected)


def test_float16_does_not_overflow_silently(tmp_path):
    tensors = tensors_of(dtype="bfloat16")
    tensors[WQ][90, 2] = 1e6
    refused(
        save(tmp_path / "src", split(tensors, 2, 1)),
        tmp_path / "m",
        rf"^{WQ}: the value at \[90, 2\] is 999424",
        dtype="float16",
    )


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ([1], r"src: consolidated\.01\.pth missing, up to consolidated\.03\.pth found$"),
        ([0], r"src: consolidated\.00\.pth missing, up to consolidated\.03\.pth found$"),
        ([3], r"^3 shards found, but layers\.0\.attention\.wq\.weight has 24 of 96 rows: expected 4$"),
        ([1, 2, 3], r"^1 shard found, but layers\.0\.attention\.wq\.weight has 24 of 96 rows: expected 4$"),
        ([0, 1, 2, 3], r"src has no consolidated\.00\.pth$"),
    ],
)
def test_lost_shards_are_missed(tmp_path, lost, expected):
    src = save(tmp_path / "src", split(tensors_of(), 4, 1))
    for i in lost:
        (src / f"consolidated.{i:02d}.pth").unlink()
    refused(src, tmp_path / "m", expected)


def test_a_shard_too_many_is_noticed(tmp_path):
    src = save(tmp_path / "src", split(tensors_of(), 2, 1))
    shutil.copy(src / "consolidated.01.pth", src / "consolidated.02.pth")
    refused(src, tmp_path / "m", r"^3 shards found, but layers\.0\.attention\.wq\.weight has 48 of 96 rows: expected 2$")


def test_lost_shards_are_missed_where_heads_are_not_as_wide_as_the_residual_stream(tmp_path):
    """Test a head_dim in params.json: wq has n_heads · head_dim rows."""
    config = tiny.config(n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=256, vocab_size=132)
    params = {**PARAMS, "head_dim": 16}
    src = save(tmp_path / "src", split(tensors_of(config), 4, 1), params)
    convert(src, tmp_path / "m")
    assert_same(tmp_path / "m", tensors_of(config))
    (src / "consolidated.03.pth").unlink()
    expected = r"^3 shards found, but layers\.0\.attention\.wq\.weight has 16 of 64 rows: expected 4$"
    refused(src, tmp_path / "lost", expected)


def test_norms_that_differ_between_shards_are_refused(tmp_path):
    shards = split(tensors_of(), 2, 1)
    shards[1]["layers.1.ffn_norm.weight"][7] += 1e-6
    refused(save(tmp_path / "src", shards), tmp_path / "m", r"^layers\.1\.ffn_norm\.weight differs between shards")


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    shards = split(tensors_of(), 2, 1)
    del shards[1][WQ]
    refused(save(tmp_path / "a", shards), tmp_path / "m", rf"^{WQ} is in only one of shards 00 and 01$")
    shards = split(tensors_of(), 2, 1)
    shards[1][WQ] = shards[1][WQ].half()
    refused(save(tmp_path / "b", shards), tmp_path / "m", rf"^{WQ} is float32 and float16 in different shards$")
    shards[1][WQ] = torch.ones(40, 96)
    refused(
        save(tmp_path / "c", shards),
        tmp_path / "m",
        rf"^{WQ} is \[48, 96\] and \[40, 96\] in 2 shards, expected \[96, 96\] in all$",
    )


BAD_PARAMS = {
    "not JSON": ("{", r"params\.json is not JSON: "),
    "not text": (b"\xff\xfe\x00", r"params\.json is not JSON: "),
    "nested": ("[" * 10**6, r"params\.json is not JSON: "),
    "a long number": (
        '{"dim": 1' + "0" * 10**4 + ', "n_layers": 2}',
        r"params\.json: dim is inf, expected a positive whole number$",
    ),
    "two of a key": ('{"dim": 96, "dim": 64}', r"params\.json is not JSON: 'dim' is there twice, with different values$"),
    "a list": ("[1, 2]", r"params\.json holds list, expected a JSON object$"),
    "a string": ({"dim": "96"}, r"params\.json: dim is '96', expected a positive whole number$"),
    "a fraction": ({"n_layers": 2.0}, r"params\.json: n_layers is 2\.0, expected a positive whole number$"),
    "true": ({"n_heads": True}, r"params\.json: n_heads is True, expected a positive whole number$"),
    "negative": ({"n_heads": -4}, r"params\.json: n_heads is -4, expected a positive whole number$"),
    "zero": ({"multiple_of": 0}, r"params\.json: multiple_of is 0, expected a positive whole number$"),
    "no eps": ({"norm_eps": None}, r"params\.json: missing norm_eps$"),
    "no dim": ({"dim": None}, r"params\.json: dim is None, expected a positive whole number$"),
    "the smallest theta": ({"rope_theta": 5e-324}, r"params\.json: rope_theta is 5e-324, expected a positive number from 1e"),
    "the largest theta": ({"rope_theta": 1e308}, r"params\.json: rope_theta is 1e\+308, expected a positive number from 1e"),
    "eps infinite": ({"norm_eps": float("inf")}, r"params\.json: norm_eps is inf, expected a positive number$"),
    "eps not a number": ({"norm_eps": float("nan")}, r"params\.json: norm_eps is nan, expected a positive number$"),
    "theta of a kind": ({"rope_theta": "large"}, r"params\.json: rope_theta is 'large', expected a positive number$"),
    "head_dim": ({"head_dim": "wide"}, r"params\.json: head_dim is 'wide', expected a positive whole number$"),
    "heads do not divide": ({"n_heads": 5}, r"params\.json: dim 96 is not a multiple of n_heads 5$"),
    "kv heads do not divide": ({"n_kv_heads": 3}, r"params\.json: n_heads 4 is not a multiple of n_kv_heads 3$"),
    "endless layers": ({"n_layers": 2**31 - 1}, r"params\.json: n_layers is 2147483647, but the shards have 2 layers$"),
    "endless width": ({"dim": 96 * 10**7}, r"^1 shard found, but layers\.0\.attention\.wq\.weight has 96 of 960{7} rows"),
    "fewer layers": ({"n_layers": 1}, r"params\.json: n_layers is 1, but the shards have 2 layers$"),
    "formula": ({"multiple_of": 100}, r"params\.json: .* give ffn_dim 300, but the weights have 256$"),
    "multiplier": ({"ffn_dim_multiplier": 1.3}, r"params\.json: .* give ffn_dim 512, but the weights have 256$"),
    "vocabulary": ({"vocab_size": 131}, r"params\.json: vocab_size is 131, but the weights have 132$"),
    "scaled": ({"use_scaled_rope": "yes"}, r"params\.json: use_scaled_rope is 'yes', expected true or false$"),
    "experts": ({"moe": {"num_experts": 8}}, r"params\.json: moe is .*: an architecture that npllama does not compute$"),
    "vision": ({"vision_chunk_size": 448}, r"params\.json: vision_chunk_size is 448: an architecture that npllama does not"),
    "quantized": ({"quantization_args": {"group_size": 32}}, r"params\.json: quantization_args is .*: an architecture that"),
    "lora": ({"lora_args": {"rank": 16}}, r"params\.json: lora_args is .*: an architecture that npllama does not compute$"),
    "window": ({"sliding_window": [4096]}, r"params\.json: sliding_window is \[4096\], expected a positive whole number$"),
    "unknown family": (
        {"rope_theta": 7.0, "max_seq_len": None},
        r'rope_theta 7 belongs to no family we know: add "max_seq_len"',
    ),
}


@pytest.mark.parametrize("fault", BAD_PARAMS)
def test_nonsense_in_params_is_one_line(tmp_path, fault):
    content, expected = BAD_PARAMS[fault]
    src = save(tmp_path / "src", [tensors_of()])
    if isinstance(content, dict):
        content = json.dumps(PARAMS | content)
    (src / "params.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(src, tmp_path / "m", expected)


def test_harmless_keys_pass_and_unknown_ones_are_named(tmp_path):
    params = PARAMS | {"max_batch_size": 32, "vision_chunk_size": -1, "sliding_window": None, "moe": None, "colour": "blue"}
    lines = convert(save(tmp_path / "src", [tensors_of()], params), tmp_path / "m")
    assert "ignored in params.json: colour" in lines


def test_a_source_that_is_not_there(tmp_path):
    refused(tmp_path / "src", tmp_path / "m", r"src: not found, expected a folder of Meta's")
    save(tmp_path / "src", [tensors_of()])
    (tmp_path / "src" / "params.json").unlink()
    refused(tmp_path / "src", tmp_path / "m", r"params\.json is missing$")
    one_file = tmp_path / "src" / "consolidated.00.pth"
    refused(one_file, tmp_path / "m", r"00\.pth is one of a folder's files: expected the folder$")


def test_a_rope_factor_needs_scaled_rope(tmp_path):
    refused(save(tmp_path / "src", [tensors_of()]), tmp_path / "m", "has no use_scaled_rope: true$", rope_factor=8)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_rope_factor_is_refused(tmp_path, factor):
    src = save(tmp_path / "src", [tensors_of()], PARAMS | {"use_scaled_rope": True})
    refused(src, tmp_path / "m", r"factor is .*, expected a positive number$", rope_factor=factor)


def test_without_torch_the_line_says_what_to_install(tmp_path, monkeypatch):
    src = save(tmp_path / "src", [tensors_of()])
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(src, tmp_path / "m", r"pip install 'npllama\[torch\]'$")


def test_without_sentencepiece_its_tokenizer_is_copied_unchecked(tmp_path, monkeypatch):
    src = save(tmp_path / "src", [tensors_of()])
    (src / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert any("not checked" in line for line in convert(src, tmp_path / "m"))
    assert open_model(tmp_path / "m").generation["chat_format"] is None  # no vocabulary of Llama 2's size
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == (src / "tokenizer.model").read_bytes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, shared_data):
    src = save(tmp_path / "src", [tensors_of()])
    shutil.copy(shared_data / "llama2-tokenizer" / "tokenizer.model", src)
    refused(src, tmp_path / "m", r"tokenizer\.model has 32000 tokens, but the model's vocabulary 132: is it another")


def test_stories260k_converts(tmp_path, shared_data):
    src = shared_data / "stories260K"
    convert(src, tmp_path / "m")
    model = load(tmp_path / "m")
    config = model.config
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.ffn_dim) == (64, 5, 8, 4, 172)
    assert config.vocab_size == model.tokenizer.vocab_size == 512
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == (src / "tokenizer.model").read_bytes()
    source = torch.load(src / "consolidated.00.pth", weights_only=True)
    assert_same(tmp_path / "m", {name: tensor for name, tensor in source.items() if name != "output.weight"})
    assert torch.equal(source["output.weight"], source["tok_embeddings.weight"])


# -------------------------------------------------------------------------------------------------------------- progress, kills


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals(tmp_path, monkeypatch, capsys, terminal):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    convert(save(tmp_path / "src", [tensors_of()]), tmp_path / "m")
    out, err = capsys.readouterr()
    assert out == ""
    assert ("100%" in err and "B/s" in err) == terminal
    assert terminal or err == ""


def test_no_bar_without_tqdm(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    convert(save(tmp_path / "src", [tensors_of()]), tmp_path / "m")
    assert capsys.readouterr().err == ""


def test_every_byte_is_reported_once(tmp_path, monkeypatch):
    counts = []

    class Bar:
        def __init__(self, total, **options):
            counts.append(-total)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def update(self, n):
            counts.append(n)

    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    convert(save(tmp_path / "src", split(tensors_of(dtype="bfloat16"), 2, 1)), tmp_path / "m")
    assert sum(counts) == 0
    assert len(counts) > 100


@pytest.mark.slow
def test_killed_at_random_moments_then_run_again(tmp_path, monkeypatch):
    monkeypatch.undo()  # blocks of the real size
    config = tiny.config(dim=512, n_heads=8, n_kv_heads=8, head_dim=64, ffn_dim=1536, vocab_size=2000, n_layers=4)
    params = PARAMS | {"dim": 512, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8}
    src = save(
        tmp_path / "src", split({n: torch.from_numpy(a) for n, a in tiny.random_params(config, seed=5).items()}, 2, 1), params
    )
    target = tmp_path / "m"
    started = time.monotonic()
    convert(src, target)
    seconds = time.monotonic() - started
    code = """
import sys, torch
from npllama_convert import sources
print("now", flush=True)
sources.convert(sys.argv[1], sys.argv[2], force=True, report=len)
"""
    moments = random.Random(7)
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(src), str(target)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "now\n"
            time.sleep(moments.random() * seconds)
            process.kill()
        assert verify(target) == []  # the old model or the new one: replacing loses nothing
        left = sorted(path.name for path in tmp_path.iterdir() if path.name not in ("m", "src"))
        assert all(name.startswith((".m.partial-", ".m.old-", ".m.npllama-lock")) for name in left)
    convert(src, target, force=True)
    assert verify(target) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "src"]


def test_torch_is_imported_by_nothing_before_it_is_needed():
    code = "import sys, npllama_convert.meta, npllama_convert.capture; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("vocab_size", "max_seq_len", "name"),
    [(32000, 4096, "llama2"), (32016, 16384, "llama2"), (32000, 2048, None), (512, 4096, None)],
)
def test_the_chat_format_is_llama_2_s_for_its_vocabulary_alone(vocab_size, max_seq_len, name, tiny_sentencepiece):
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size, max_seq_len=max_seq_len)
    for tokenizer in (tiny_sentencepiece, None):  # None: its package is missing
        assert meta.chat_format(config, tokenizer) == name


def test_the_chat_format_is_told_by_the_special_tokens(tiny_tiktoken, tiny_mistral, tiny_chatml):
    for tokenizer, name in ((tiny_tiktoken, "llama3"), (tiny_mistral, "mistral"), (tiny_chatml, "chatml")):
        assert meta.chat_format(CONFIG, tokenizer) == name
    assert meta.chat_format(CONFIG, SimpleNamespace(special_tokens={"<|endoftext|>": 0})) is None
