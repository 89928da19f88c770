"""Test llama2.c's files: the order of the weights, and the size, which is the only magic number."""

from __future__ import annotations

import dataclasses
import shutil
import struct

import numpy as np
import pytest

from npllama.checkpoint import open_model, verify

import tiny
from conversions import assert_same, convert, refused

foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)

# llama2.c knows one kind: heads of dim / n_heads, θ 10000, eps 1e-5.
CONFIGS = {
    "untied": tiny.config(n_kv_heads=6),
    "tied": tiny.config(tied_embeddings=True, n_layers=3),
    "grouped": tiny.config(n_kv_heads=2, max_seq_len=64),
}
CONFIG = CONFIGS["grouped"]
PARAMS = tiny.random_params(CONFIG, seed=5)
ARGS = {"dim": 96, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 131, "multiple_of": 256, "norm_eps": 1e-5}


def shared_lists() -> list:
    """Make a list that would hold 2⁶⁰ lists if it were written out."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


@pytest.fixture(autouse=True)
def small_blocks(quick_conversion):
    """Read in blocks of a few rows."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bin_comes_back_bit_for_bit(tmp_path, name):
    config = CONFIGS[name]
    params = tiny.random_params(config, seed=5)
    convert(foreign.write_llama2c(tmp_path / "model.bin", config, params), tmp_path / "m")
    assert_same(tmp_path / "m", params)
    assert open_model(tmp_path / "m").config == config
    assert open_model(tmp_path / "m").manifest["source"]["kind"] == "llama2.c"
    assert verify(tmp_path / "m") == []


@pytest.mark.torch
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_pt_comes_back_bit_for_bit(tmp_path, compiled, tied):
    import torch

    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    params = tiny.random_params(config, seed=5)
    state = {name: torch.from_numpy(array) for name, array in params.items()}
    if tied:  # both names, one storage
        state["output.weight"] = state["tok_embeddings.weight"]
    args = {
        "dim": 96, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 131, "multiple_of": 256, "hidden_dim": None,
        "norm_eps": 1e-5, "max_seq_len": 64, "dropout": 0.0,
    }  # fmt: skip
    content = {
        "model": {"_orig_mod." * compiled + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": args,
        "iter_num": 1000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out"},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "m")
    assert_same(tmp_path / "m", params)
    assert open_model(tmp_path / "m").config == config


@pytest.mark.parametrize("name", ["tokenizer.model", "tok340.model"])
def test_the_tokenizer_next_to_it_is_converted_too(tmp_path, name, tiny_sentencepiece_file):
    config = tiny.config(n_layers=1, vocab_size=340)
    src = foreign.write_llama2c(tmp_path / "model.bin", config, tiny.random_params(config, seed=5))
    shutil.copy(tiny_sentencepiece_file, tmp_path / name)
    convert(src, tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == tiny_sentencepiece_file.read_bytes()
    assert open_model(tmp_path / "m").generation["chat_format"] is None


def header(**changes: int) -> bytes:
    values = {"dim": 96, "hidden": 256, "layers": 2, "heads": 6, "kv_heads": 2, "vocabulary": -131, "context": 64} | changes
    return struct.pack("<7i", *values.values())


BAD = {
    "a byte less": (lambda data: data[:-1], r"model\.bin is [\d,]+ bytes, expected [\d,]+ if its first numbers are llama2\.c"),
    "a byte more": (lambda data: data + b"\0", r"is [\d,]+ bytes, expected"),
    "half": (lambda data: data[: len(data) // 2], r"is [\d,]+ bytes, expected"),
    "the header alone": (lambda data: data[:28], r"is 28 bytes, expected"),
    "less than the header": (lambda data: data[:27], r"model\.bin is no checkpoint that npllama knows"),
    "nothing": (lambda data: b"", r"model\.bin is empty$"),
    "text": (lambda data: b"hello world, this is no model" * 50, r"is no checkpoint that npllama knows"),
    "endless layers": (lambda data: header(layers=2**31 - 1) + data[28:], r"is no checkpoint that npllama knows"),
    "a width of 2**31": (lambda data: header(dim=2**31 - 4, heads=2) + data[28:], r"expected [\d,]{20,} if its first"),
    "no heads": (lambda data: header(heads=0) + data[28:], r"is no checkpoint that npllama knows"),
    "heads that do not divide": (lambda data: header(heads=7) + data[28:], r"is no checkpoint that npllama knows"),
    "no vocabulary": (lambda data: header(vocabulary=0) + data[28:], r"is no checkpoint that npllama knows"),
    "a negative context": (lambda data: header(context=-64) + data[28:], r"is no checkpoint that npllama knows"),
    "version 2": (lambda data: struct.pack("<Ii", 0x616B3432, 2) + data, r"llama2\.c's format of version 2, expected 0 or 1"),
    "not finite": (lambda data: data[:28] + b"\0\0\x80\x7f" + data[32:], r"tok_.*: the value at \[0, 0\] is inf"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bin_that_is_none_is_one_line(tmp_path, fault):
    spoil, expected = BAD[fault]
    src = foreign.write_llama2c(tmp_path / "model.bin", CONFIG, PARAMS)
    src.write_bytes(spoil(src.read_bytes()))
    refused(src, tmp_path / "m", expected)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"x": 1}, r"has no model_args and model: expected llama2\.c's \.pt"),
        ([1, 2], r"has no model_args and model"),
        ({"model_args": {"dim": 96}, "model": {}}, r"x\.pt: missing n_layers$"),
        ({"model_args": {"dim": 96, "n_layers": 2, "n_heads": 2, "norm_eps": 1e-5}, "model": {}}, r"n_layers is 2, but"),
        ({"model_args": {}, "model": {"a": "b"}}, r"x\.pt: 'a' is str, expected tensors by name$"),
        ({"model_args": {}, "model": {1: 2}}, r"x\.pt: 1 is int, expected tensors by name$"),
        ({"model_args": ARGS | {"dim": 10**400}}, r"x\.pt: dim is a whole number of 1,329 bits, expected a positive whole"),
        ({"model_args": ARGS | {"norm_eps": 10**400}}, r"x\.pt: norm_eps is a whole number of 1,329 bits, expected a positive"),
        ({"model_args": ARGS | {"rope_theta": 5e-324}}, r"x\.pt: rope_theta is 5e-324, expected a positive number from "),
        (
            {"model_args": ARGS | {"n_layers": shared_lists()}},
            r"x\.pt: n_layers is '\[\[.*', expected a positive whole number$",
        ),
        ({"model_args": ARGS | {"moe": shared_lists()}}, r"x\.pt: moe is '\[\[.*': an architecture that npllama does not"),
    ],
)
def test_a_pt_that_is_none_is_one_line(tmp_path, content, expected):
    import torch

    if isinstance(content, dict) and "model" not in content:
        content = content | {"model": {name: torch.from_numpy(array) for name, array in PARAMS.items()}}
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path / "m", expected)


@pytest.mark.torch
def test_stories260k_is_the_same_model_as_from_meta(tmp_path, shared_data):
    """Test the form of its published .bin, written here from Meta's form of the same weights."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    convert(shared_data / "stories260K", tmp_path / "meta")
    model = open_model(tmp_path / "meta")
    foreign.write_llama2c(tmp_path / "stories260K.bin", model.config, model.params)
    shutil.copy(shared_data / "stories260K" / "tokenizer.model", tmp_path / "tok512.model")
    convert(tmp_path / "stories260K.bin", tmp_path / "m")
    assert_same(tmp_path / "m", {name: np.array(array) for name, array in model.params.items()})
    assert (tmp_path / "m" / "config.json").read_bytes() == (tmp_path / "meta" / "config.json").read_bytes()
