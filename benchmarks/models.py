"""Write the measured shapes as model directories of random or zero weights: the values don't change the speed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from npllama import Config, parameter_shapes
from npllama.checkpoint import FORMAT_VERSION, STORAGE, Storage, takes_int8
from npllama.engine.grouped import INT4, Grouping

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
    dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=192, vocab_size=512, norm_eps=1e-5,
    rope_theta=10000.0, rope_scaling=None, max_seq_len=4096, tied_embeddings=False,
)  # fmt: skip


Q4_K = Grouping(bits=4, group=32, scale="uint8", offset=True, unit=8)
Q6_K = Grouping(bits=8, group=16, scale="int8", unit=16)


def q4_k_m(config: Config) -> dict[str, Storage]:
    """Return the storages of llama.cpp's Q4_K_M: Q4_K, but Q6_K for the output matrix and half of wv and w2.

    Source: llama.cpp, src/llama-quant.cpp, use_more_bits.
    """
    n, kinds = config.n_layers, {}
    for name, shape in parameter_shapes(config).items():
        kinds[name] = "float32" if len(shape) == 1 else Q4_K
        if name.endswith(("wv.weight", "w2.weight")):
            i = int(name.split(".")[1])
            if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2:
                kinds[name] = Q6_K
    if config.tied_embeddings:
        kinds["tok_embeddings.weight"] = Q6_K
    else:
        kinds |= {"output.weight": Q6_K, "tok_embeddings.weight": replace(Q4_K, rows_first=True)}
    return kinds


def _storage(name: str, dtype: str | Mapping[str, Storage]) -> Storage:
    if isinstance(dtype, Mapping):
        return dtype[name]
    if dtype in ("int8", "int4") and not takes_int8(name):
        return "bfloat16"
    return INT4 if dtype == "int4" else dtype


def write(path: Path, config: Config, dtype: str | Mapping[str, Storage], sparse: bool = False) -> Path:
    """Write a model directory of random numbers, or of sparse files, which take no room on the disk and read as zeros.

    checkpoint.create() would hash what it writes, which nothing here reads.
    """
    path.mkdir()
    blocks: dict[str, Iterator[np.ndarray]] = {}
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        if isinstance(kind := _storage(name, dtype), Grouping):
            tensors[name] = _write_grouped(path, name, shape, kind, None if sparse else next(_blocks("uint8")))
            continue
        fill = None if sparse else next(blocks.setdefault(kind, _blocks(kind)))
        tensors[name] = {"dtype": kind, "shape": list(shape), **_write_array(path / f"{name}.npy", shape, STORAGE[kind], fill)}
        if kind == "int8":
            scale = np.full(1, 1e-3, np.float32)
            tensors[name]["scale"] = _write_array(path / f"{name}.scale.npy", shape[:1], STORAGE["float32"], scale)
    manifest = {"npllama_format": FORMAT_VERSION, "source": {"kind": "random"}, "tensors": tensors, "files": {}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def _blocks(dtype: str) -> Iterator[np.ndarray]:
    """Yield the same four million random numbers again and again, rotated by another offset each time."""
    random = np.random.default_rng(0)
    numbers = random.standard_normal(1 << 22, dtype=np.float32)
    if dtype == "uint8":
        numbers = random.integers(0, 256, 1 << 22, dtype=np.uint8)
    elif dtype == "int8":
        numbers = np.clip(numbers * 32, -127, 127).astype(np.int8)
    else:
        numbers *= np.float32(0.02)
        numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else numbers.astype(STORAGE[dtype])
    start = 0
    while True:
        yield np.roll(numbers, start)
        start += 12345


def _write_grouped(
    path: Path, name: str, shape: tuple[int, ...], grouping: Grouping, fill: np.ndarray | None
) -> dict[str, object]:
    entry: dict[str, object] = {"dtype": "grouped", "shape": list(shape), "grouping": asdict(grouping)}
    for part, (part_shape, dtype) in grouping.parts(shape).items():
        if part == "values":
            entry |= _write_array(path / f"{name}.npy", part_shape, dtype, None if fill is None else fill.view(dtype))
            continue
        file = path / f"{name}.{part}.npy"
        whole = part == "scale" and grouping.unit  # in two levels the scales are whole numbers
        entry[part] = _write_array(file, part_shape, dtype, None if fill is None else np.full(1, 1 if whole else 1e-3, dtype))
    return entry


def _write_array(file: Path, shape: tuple[int, ...], dtype: np.dtype, fill: np.ndarray | None) -> dict[str, object]:
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    if fill is not None:
        flat = array.reshape(-1)
        fill = np.resize(fill, min(flat.size, max(fill.size, 1 << 20)))  # one number at a time would take minutes
        for start in range(0, flat.size, fill.size):
            part = flat[start : start + fill.size]
            part[:] = np.resize(fill, part.size)
    del array
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": ""}


def bytes_per_token(config: Config, itemsize: float, n_layers: int | None = None) -> float:
    """Return how many bytes of weights a decode step reads: every matrix but an embedding that isn't the output matrix."""
    return itemsize * (_layer_size(config) * (n_layers or config.n_layers) + config.vocab_size * config.dim)


def prefill_flops(config: Config, n: int, n_layers: int | None = None) -> float:
    """Return the operations of a prompt's matrix products: weights, attention up to each query, one row of logits."""
    attention = 4 * config.n_heads * config.head_dim * n * (n + 1) / 2
    layer = 2 * n * _layer_size(config) + attention
    return layer * (n_layers or config.n_layers) + 2 * config.vocab_size * config.dim


def _layer_size(config: Config) -> int:
    heads = 2 * config.n_heads + 2 * config.n_kv_heads
    return config.dim * (heads * config.head_dim + 3 * config.ffn_dim)
