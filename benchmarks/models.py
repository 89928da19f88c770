"""The shapes that are measured, as model directories of random or zero weights: their values do not change what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from npllama import Config, parameter_shapes
from npllama.checkpoint import FORMAT_VERSION, STORAGE, takes_int8

SMOLLM2_135M = Config(
    dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=49152, norm_eps=1e-5,
    rope_theta=100000.0, rope_scaling=None, max_seq_len=8192, tied_embeddings=True,
)  # fmt: skip
SMOLLM2_360M = replace(SMOLLM2_135M, dim=960, n_layers=32, n_heads=15, n_kv_heads=5, ffn_dim=2560)
TINYLLAMA_1B = replace(
    SMOLLM2_135M, dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, ffn_dim=5632, vocab_size=32000, tied_embeddings=False
)
LLAMA_3B = replace(
    SMOLLM2_135M, dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, head_dim=128, ffn_dim=8192, vocab_size=128256
)  # Llama 3.2 3B
LLAMA_8B = replace(LLAMA_3B, dim=4096, n_layers=32, n_heads=32, ffn_dim=14336, tied_embeddings=False)  # Llama 3 8B
TINY = Config(
    dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=176, vocab_size=512, norm_eps=1e-5,
    rope_theta=10000.0, rope_scaling=None, max_seq_len=4096, tied_embeddings=False,
)  # fmt: skip


def write(path: Path, config: Config, dtype: str, sparse: bool = False) -> Path:
    """A model directory of random numbers, or of none: a sparse file takes no room on the disk and reads as zeros.

    checkpoint.create() would hash what it writes, which nothing here reads.
    """
    path.mkdir()
    blocks = _blocks(dtype)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        kind = "bfloat16" if dtype == "int8" and not takes_int8(name) else dtype
        fill = None if sparse else next(blocks) if kind == dtype else next(_blocks(kind))
        tensors[name] = _write_array(path / f"{name}.npy", shape, kind, fill)
        if kind == "int8":
            scale = np.full(1, 1e-3, np.float32)
            tensors[name]["scale"] = _write_array(path / f"{name}.scale.npy", shape[:1], "float32", scale)
    manifest = {"npllama_format": FORMAT_VERSION, "source": {"kind": "random"}, "dtype": dtype, "tensors": tensors, "files": {}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def _blocks(dtype: str) -> Iterator[np.ndarray]:
    """The same four million random numbers again and again, begun at another place each time."""
    numbers = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    if dtype == "int8":
        numbers = np.clip(numbers * 32, -127, 127).astype(np.int8)
    else:
        numbers *= np.float32(0.02)
        numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else numbers.astype(STORAGE[dtype])
    start = 0
    while True:
        yield np.roll(numbers, start)
        start += 12345


def _write_array(file: Path, shape: tuple[int, ...], dtype: str, fill: np.ndarray | None) -> dict[str, object]:
    array = np.lib.format.open_memmap(file, mode="w+", dtype=STORAGE[dtype], shape=shape)
    if fill is not None:
        flat = array.reshape(-1)
        for start in range(0, flat.size, fill.size):
            part = flat[start : start + fill.size]
            part[:] = np.resize(fill, part.size)
    del array
    return {"file": file.name, "dtype": dtype, "shape": list(shape), "bytes": file.stat().st_size, "sha256": ""}


def bytes_per_token(config: Config, itemsize: float, n_layers: int | None = None) -> float:
    """What a decode step reads of the weights: every matrix but an embedding that isn't the output matrix."""
    return itemsize * (_layer_size(config) * (n_layers or config.n_layers) + config.vocab_size * config.dim)


def prefill_flops(config: Config, n: int, n_layers: int | None = None) -> float:
    """What a prompt's products of matrices take: the weights', attention's up to each query, and one row of logits."""
    attention = 4 * config.n_heads * config.head_dim * n * (n + 1) / 2
    layer = 2 * n * _layer_size(config) + attention
    return layer * (n_layers or config.n_layers) + 2 * config.vocab_size * config.dim


def _layer_size(config: Config) -> int:
    heads = 2 * config.n_heads + 2 * config.n_kv_heads
    return config.dim * (heads * config.head_dim + 3 * config.ffn_dim)
