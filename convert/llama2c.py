"""Read karpathy/llama2.c's models: `.bin` of versions 0 and 1 without torch, the training checkpoint `.pt` with it.

A .bin of version 0 has no magic number. It holds seven integers, then float32 numbers, so its size is what identifies it:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, ±vocab_size, max_seq_len
    embedding, attention norms of all layers, wq of all layers, wk, wv, wo, feed-forward norms, w1, w2, w3, last norm,
    cosines and sines of every position's angles (tables, which npllama recomputes), and the output matrix if vocab_size < 0.
Sources: llama2.c, export.py (legacy_export, version1_export) and run.c (memory_map_weights).
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from npllama.checkpoint import CheckpointError
from npllama.checkpoint.foreign import file_size
from npllama.config import Config, ConfigError, n_parameters, parameter_shapes
from npllama.errors import shown

from . import meta, torch_file
from .conversion import OWN, Report, Source, Tensor, TokenizerChoice, add_tokenizer, tie

HEADER = struct.Struct("<7i")
NEWER_HEADER = 256
NEWER_MAGIC = b"24ka"  # 0x616b3432, "ak42", of versions 1 and 2
NORM_EPS, ROPE_THETA = 1e-5, 10000.0  # constants of run.c
PLAUSIBLE_LAYERS = 10_000
PLAIN = (str, int, float, type(None))


def read(src: Path, report: Report, choice: TokenizerChoice = OWN) -> Source:
    """Open a .bin or a .pt, detected by content. Raises CheckpointError, a ValueError, with one line."""
    file_size(src, CheckpointError)
    with open(src, "rb") as file:
        start = file.read(HEADER.size)
    if start[:4] == NEWER_MAGIC:
        source = _read_newer(src, start, report)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # a zip file, or a bare pickle
        source = _read_pt(src, report)
    else:
        source = _read_bin(src, start, report)
    names = ("tokenizer.model", f"tok{source.config.vocab_size}.model")
    if tokenizer := choice.of(next((src.with_name(name) for name in names if src.with_name(name).is_file()), None)):
        add_tokenizer(source, tokenizer, report)
    return source


def _read_bin(src: Path, start: bytes, report: Report) -> Source:
    size = src.stat().st_size
    config = _config_of_bin(start)
    if config is None:
        raise CheckpointError(f"{src} is no checkpoint that npllama knows: expected GGUF, or .bin or .pt of llama2.c")
    n_tables = config.max_seq_len * config.head_dim  # K/2 cosines and K/2 sines of each position
    expected = HEADER.size + 4 * (n_parameters(config) + n_tables)
    if size != expected:
        raise CheckpointError(f"{src} is {size:,} bytes, expected {expected:,} if its first numbers are llama2.c's: cut off?")
    report(f"norm_eps: {NORM_EPS:g}, rope_theta: {ROPE_THETA:g} (llama2.c's constants)")

    of_layer = [name for name in parameter_shapes(config) if name.startswith("layers.0.")]  # in llama2.c's order
    order = ["tok_embeddings.weight", *_of_all_layers(of_layer, config), "norm.weight", *_output(config)]
    return _source(src, config, order, HEADER.size, n_tables, report)


def _read_newer(src: Path, start: bytes, report: Report) -> Source:
    """Open a .bin of version 1: a header of 256 bytes, the norms, the embedding, then the matrices as in version 0."""
    version = struct.unpack_from("<i", start, 4)[0] if len(start) >= 8 else 0
    if version != 1:
        raise CheckpointError(
            f"{src} is llama2.c's format of version {version}, expected 0 or 1 (2 is quantized: export.py --version 1)"
        )
    with open(src, "rb") as file:
        header = file.read(NEWER_HEADER)
    config = _config_of_bin(header[8 : 8 + HEADER.size], tied=header[36:37] != b"\0")
    if config is None or len(header) < NEWER_HEADER:
        raise CheckpointError(f"{src} begins as llama2.c's format of version 1, but no model has its constants: damaged?")
    expected = NEWER_HEADER + 4 * n_parameters(config)
    if (size := src.stat().st_size) != expected:
        raise CheckpointError(f"{src} is {size:,} bytes, expected {expected:,}: cut off?")
    report(f"norm_eps: {NORM_EPS:g}, rope_theta: {ROPE_THETA:g} (llama2.c's constants)")
    of_layer = [name for name in parameter_shapes(config) if name.startswith("layers.0.")]
    norms = [name for name in of_layer if "norm" in name]
    matrices = [name for name in of_layer if "norm" not in name]
    order = [*_of_all_layers(norms, config), "norm.weight", "tok_embeddings.weight"]
    order += [*_of_all_layers(matrices, config), *_output(config)]
    return _source(src, config, order, NEWER_HEADER, 0, report)


def _of_all_layers(names: list[str], config: Config) -> list[str]:
    return [name.replace("0", str(i), 1) for name in names for i in range(config.n_layers)]


def _output(config: Config) -> list[str]:
    return [] if config.tied_embeddings else ["output.weight"]


def _source(src: Path, config: Config, order: list[str], offset: int, n_tables: int, report: Report) -> Source:
    """Map the parameters, which follow one another in this order; before the output matrix come the tables' numbers."""
    shapes = parameter_shapes(config)
    floats, at, tensors = np.asarray(np.memmap(src, "<f4", "r", offset=offset)), 0, {}
    for name in order:
        at += n_tables * (name == "output.weight")
        n = math.prod(shapes[name])
        tensors[name] = Tensor.of(floats[at : at + n].reshape(shapes[name]))
        at += n
    config, tensors = tie(config, {name: tensors[name] for name in shapes}, report)
    return Source("llama2.c", config, tensors, [src])


def _config_of_bin(start: bytes, tied: bool | None = None) -> Config | None:
    """Return the config that the first seven numbers state, or None if no model can have them.

    tied   None: the vocabulary's sign says it
    """
    if len(start) < HEADER.size:
        return None
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = HEADER.unpack(start)
    if n_heads <= 0 or dim % n_heads or n_layers > PLAUSIBLE_LAYERS:
        return None
    with contextlib.suppress(ConfigError):
        return Config(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=dim // n_heads,
            ffn_dim=hidden_dim,
            vocab_size=abs(vocab_size),
            norm_eps=NORM_EPS,
            rope_theta=ROPE_THETA,
            rope_scaling=None,
            max_seq_len=max_seq_len,
            tied_embeddings=vocab_size > 0 if tied is None else tied,
        )
    return None


def _read_pt(src: Path, report: Report) -> Source:
    """Open a training checkpoint: model_args with params.json's keys, and model, a state dict in Meta's names."""
    content = torch_file.load(src, report)
    params, state = (content.get(key) if isinstance(content, Mapping) else None for key in ("model_args", "model"))
    if not isinstance(params, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(
            f"{src} has no model_args and model: expected llama2.c's .pt, or the folder of another checkpoint"
        )
    # A pickle may hold anything, including lists that share their parts: only what a JSON file could state is read.
    params = {
        key if isinstance(key, str) else shown(key): value if isinstance(value, PLAIN) else shown(value)
        for key, value in params.items()
    }
    try:
        config, tensors = meta.assemble(params, [torch_file.arrays(src, state)], report=report)
    except ConfigError as error:
        raise CheckpointError(f"{src}: {error}") from None
    return Source("llama2.c", config, tensors, [src])
