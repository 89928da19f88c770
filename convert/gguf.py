"""Read llama.cpp's GGUF files, versions 2 and 3, whole or split, without torch. gguf_blocks.py unpacks quantised blocks.

The header is parsed here, and every count is checked against the file's size, because the package gguf trusts the file.
Queries and keys are interleaved already. RoPE scaling is the tensor rope_freqs.weight: one divisor per pair.
Source: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import importlib
import math
import re
import struct
import sys
import tempfile
from collections.abc import Mapping
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from npllama.checkpoint import CheckpointError
from npllama.config import Config, ConfigError, LinearRopeScaling, RopeScaling
from npllama.errors import shown
from npllama.ops import rope_frequencies

from .conversion import (
    OWN,
    Report,
    Source,
    Tensor,
    TokenizerChoice,
    add_tokenizer,
    check_tokenizer,
    head_sizes,
    llama3_scaling,
    match,
    number,
    recommended,
    refuse_foreign,
    tie,
    whole,
    within_window,
)
from .gguf_blocks import BLOCKS, grouped
from .gguf_vocabulary import tokenizer_config, tokenizer_file
from .templates import add_templates, templates_of_gguf

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_LIMIT = 32 << 20  # bytes of metadata and tensor names; a vocabulary of 200,000 with its merges takes 15 million
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9
PLAIN: dict[int, np.dtype] = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype("<u2")}  # F32, F16, BF16
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "layers.N.attention_norm.weight": "blk.N.attn_norm.weight",
    "layers.N.attention.wq.weight": "blk.N.attn_q.weight",
    "layers.N.attention.wk.weight": "blk.N.attn_k.weight",
    "layers.N.attention.wv.weight": "blk.N.attn_v.weight",
    "layers.N.attention.wo.weight": "blk.N.attn_output.weight",
    "layers.N.ffn_norm.weight": "blk.N.ffn_norm.weight",
    "layers.N.feed_forward.w1.weight": "blk.N.ffn_gate.weight",
    "layers.N.feed_forward.w2.weight": "blk.N.ffn_down.weight",
    "layers.N.feed_forward.w3.weight": "blk.N.ffn_up.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
FOREIGN_KEY = re.compile(r"llama\.(.*expert.*|attention\.scale|.*_scale|.*softcapping|use_parallel_residual)")


def read(src: Path, report: Report, choice: TokenizerChoice = OWN) -> Source:
    """Open a .gguf file, one file of a split model, or a folder that holds one model.

    Raises CheckpointError, a ValueError, with one line.
    """
    files = find_files(src)
    metadata, tensors = open_file(files[0])
    for file in files[1:]:
        more = open_file(file)[1]
        if twice := sorted(tensors.keys() & more.keys()):
            raise CheckpointError(f"{file}: {twice[0]} is in another file already")
        tensors |= more
    try:
        refuse(metadata)
        config = resolve(metadata, tensors, report)
    except ConfigError as error:
        raise CheckpointError(f"{files[0]}: {error}") from None
    tensors.pop("rope_freqs.weight", None)
    if undone := sorted({tensor.undone for tensor in tensors.values() if tensor.undone}):
        report(f"{', '.join(undone)}: not stored as such, dequantised to float32 by the package gguf")
    config, tensors = tie(config, match(files[0], config, NAMES, tensors, report), report)
    source = Source("gguf", config, tensors, files, generation=_sampling(files[0], metadata, report))
    if choice.file:
        loaded = add_tokenizer(source, choice.file, report)
        add_templates(source, templates_of_gguf(metadata), loaded, choice.file.parent, report)
    elif not choice.leave_out:
        _add_tokenizer(source, metadata, report)
    return source


# ------------------------------------------------------------------------------------------------------------------ metadata


def refuse(metadata: Mapping[str, object]) -> None:
    """Raise ConfigError, which names the key, for the metadata of anything but a plain Llama."""
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise ConfigError(f"general.architecture is {architecture!r:.80}, expected 'llama'")
    refuse_foreign(metadata, FOREIGN_KEY)
    if metadata.get("llama.attention.causal", True) is not True:
        raise ConfigError("llama.attention.causal is not true: an architecture that npllama does not compute")


def resolve(metadata: Mapping[str, object], tensors: Mapping[str, Tensor], report: Report) -> Config:
    """Return every model constant from the metadata; missing ones are inferred as llama.cpp does, and reported."""
    known = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    n_heads, n_kv_heads, head_dim = head_sizes(
        known, "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length", report
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if known.get(key, head_dim) != head_dim:
            raise ConfigError(f"llama.{key} is {known[key]!r:.80}, expected {head_dim} as of the keys")
    if "rope.freq_base" in known:
        rope_theta = number(known, "rope.freq_base")
    else:
        rope_theta = 10000.0
        report("rope_theta: 10000 (inferred: llama.cpp's default)")
    if "vocab_size" not in known:
        if "token_embd.weight" not in tensors:
            raise CheckpointError("token_embd.weight is missing")
        known["vocab_size"] = tensors["token_embd.weight"].shape[0]
        report(f"vocab_size: {known['vocab_size']} (from the weights)")
    return Config(
        dim=whole(known, "embedding_length"),
        n_layers=whole(known, "block_count"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=whole(known, "feed_forward_length"),
        vocab_size=whole(known, "vocab_size"),
        norm_eps=number(known, "attention.layer_norm_rms_epsilon"),
        rope_theta=rope_theta,
        rope_scaling=scaling_of(known, head_dim, rope_theta, tensors.get("rope_freqs.weight")),
        max_seq_len=within_window(known, "attention.sliding_window", whole(known, "context_length"), report),
        tied_embeddings="output.weight" not in tensors,
    )


def scaling_of(
    known: Mapping[str, object], head_dim: int, rope_theta: float, divisors: Tensor | None
) -> RopeScaling | LinearRopeScaling | None:
    """Return the RoPE scaling that a file's metadata and its frequency divisors state."""
    kind = known.get("rope.scaling.type", "linear" if "rope.scale_linear" in known else "none")
    if kind not in ("none", "linear"):
        raise ConfigError(f"llama.rope.scaling.type is {kind!r:.80}, expected none or linear")
    key = "rope.scaling.factor" if "rope.scaling.factor" in known else "rope.scale_linear"
    linear = LinearRopeScaling(number(known, key)) if kind == "linear" else None
    if divisors is None:
        return linear
    if linear is not None or divisors.shape != (head_dim // 2,) or divisors.dtype != np.float32:
        raise ConfigError(
            f"rope_freqs.weight is {divisors.dtype} {list(divisors.shape)}, expected float32 [{head_dim // 2}] alone"
        )
    found = divisors.rows(0, head_dim // 2).astype(np.float64)
    if (found == 1).all():
        return None
    # Long wavelengths are divided by the factor itself, all others by less.
    factor = float(str(np.float32(found.max())))
    if 0 < factor < math.inf:
        scaling = llama3_scaling(factor)
        exact = rope_frequencies(head_dim, rope_theta, None, "float64") / rope_frequencies(
            head_dim, rope_theta, scaling, "float64"
        )
        if np.abs(found / exact - 1).max() < 1e-5:
            return scaling
    raise ConfigError("rope_freqs.weight is a scaling of RoPE other than Llama 3.1's, which npllama does not compute")


def _sampling(path: Path, metadata: Mapping[str, object], report: Report) -> dict[str, object]:
    """Return the recommended temperature and top_p, which newer files have."""
    keys = {"temperature": "general.sampling.temp", "top_p": "general.sampling.top_p"}
    return recommended(path, {name: metadata[key] for name, key in keys.items() if key in metadata}, report)


def _add_tokenizer(source: Source, metadata: Mapping[str, object], report: Report) -> None:
    """Rebuild the tokenizer's file from the vocabulary; with an unknown kind, the model has token ids only."""
    if "tokenizer.ggml.model" not in metadata:
        return
    values = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    tokens = values.get("tokenizer.ggml.tokens")
    for key in [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom")]:
        n = len(tokens) if isinstance(tokens, list) else 0
        id = values.get(key)
        if key in values and n and not (type(id) is int and 0 <= id < n):
            report(f"{source.files[0]}: {key} is {shown(values.pop(key))}, expected 0 to {n - 1}: left out")
    try:
        name, content = tokenizer_file(values)
        files = {name: content, "tokenizer_config.json": tokenizer_config(values)}
        with tempfile.TemporaryDirectory() as folder:
            for file, data in files.items():
                (Path(folder) / file).write_bytes(data)
            tokenizer = check_tokenizer(Path(folder) / name, source.config, report)
            source.tokenizer = {**files}
            add_templates(source, templates_of_gguf(values), tokenizer, Path(folder), report)
    except ValueError as error:
        report(f"the vocabulary is left out: {error}")
        return


# --------------------------------------------------------------------------------------------------------------------- files


def find_files(src: Path) -> list[Path]:
    """Find the files of one model, in order, from its folder or any of them."""
    if src.is_dir():
        models = {SHARD.sub(r"\1-00001-of-\3.gguf", path.name) for path in src.glob("*.gguf")}
        if len(models) > 1:
            raise CheckpointError(f"{src} holds {len(models)} models, among them {min(models)}: expected one, or a file's name")
        src = src / models.pop()
    if shard := SHARD.fullmatch(src.name):
        files = [src.with_name(f"{shard[1]}-{i:05}-of-{shard[3]}.gguf") for i in range(1, int(shard[3]) + 1)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{src.parent}: {missing[0]} is missing" + f" and {len(missing) - 1} more" * (len(missing) > 1)
            )
        return files
    return [src]


class _Header:
    """Read a header's values in order, never past the end of the file."""

    def __init__(self, path: Path):
        if not path.stat().st_size:
            raise CheckpointError(f"{path} is empty")
        self.path, self.at, self.file = path, 0, np.asarray(np.memmap(path, np.uint8, "r"))
        self.data = self.file[:HEADER_LIMIT].data

    def take(self, n: int) -> int:
        """Advance by n bytes and return the offset at which they begin."""
        start, left = self.at, len(self.data) - self.at
        if n > left:
            why = "cut off" if len(self.file) <= HEADER_LIMIT else f"longer than {HEADER_LIMIT:,} bytes"
            raise CheckpointError(f"{self.path}: its header is damaged or {why}: {n:,} bytes announced at {start:,}")
        self.at += n
        return start

    def number(self, code: str) -> int | float | bool:
        """Return a scalar; a float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
        value = struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]
        return float(str(np.float32(value))) if code == "f" else value

    def whole(self, code: str) -> int:
        """Return a scalar of one of the codes for whole numbers."""
        return int(self.number(code))

    def text(self) -> str:
        length = self.whole("Q")
        start = self.take(length)
        try:
            return bytes(self.data[start : start + length]).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: its header is damaged: a text at {start:,} is not UTF-8") from None

    def value(self) -> object:
        """Return a scalar, a text, or an array of either: NumPy's of numbers, a list of texts."""
        kind = self.whole("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(self.code(kind))
        kind, n = self.whole("I"), self.whole("Q")
        if kind == STRING:
            if n > (len(self.data) - self.at) // 8:  # the length of each takes eight bytes
                self.take(8 * n)
            return [self.text() for _ in range(n)]
        dtype = np.dtype("<" + self.code(kind))
        return np.frombuffer(self.data, dtype, n, self.take(n * dtype.itemsize)) if n else np.zeros(0, dtype)

    def code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path}: its header is damaged: a value of type {kind} before {self.at:,}")
        return SCALARS[kind]


def open_file(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the metadata and the mapped tensors of one file."""
    library = _import_library()
    header = _Header(path)
    if (magic := bytes(header.data[:4])) != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}")
    header.take(4)
    if (version := header.whole("I")) not in VERSIONS:
        raise CheckpointError(f"{path}: GGUF version {version}, expected {' or '.join(map(str, VERSIONS))} (little-endian)")
    n_tensors, n_values = header.whole("Q"), header.whole("Q")
    metadata: dict[str, object] = {}
    for _ in range(n_values):
        key = header.text()
        if key in metadata:
            raise CheckpointError(f"{path}: {key[:80]} is there twice")
        metadata[key] = header.value()
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = header.text()
        if name in entries:
            raise CheckpointError(f"{path}: tensor {name[:80]} is there twice")
        n_dims = header.whole("I")
        if not 1 <= n_dims <= 4:
            raise CheckpointError(f"{path}: tensor {name[:80]} has {n_dims} dimensions, expected 1 to 4")
        shape = tuple(header.whole("Q") for _ in range(n_dims))[::-1]  # GGUF lists the innermost axis first
        entries[name] = shape, header.whole("I"), header.whole("Q")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r:.80}, expected a small positive number")
    data_start = -(-header.at // alignment) * alignment
    data = header.file[data_start:]
    return metadata, {name: _map(f"{path}: {name[:80]}", library, data, *entry) for name, entry in entries.items()}


def _map(where: str, library: ModuleType, data: np.ndarray, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    try:
        quantization = library.GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{where} is of the unknown type {kind}, expected F32, F16, BF16, {', '.join(BLOCKS)}") from None
    if kind not in PLAIN and quantization.name not in BLOCKS and not _can_undo(library, quantization):
        raise CheckpointError(
            f"{where} is {quantization.name}, which gguf can't dequantise: expected F32, F16, BF16, {', '.join(BLOCKS)}"
        )
    block, block_bytes = library.GGML_QUANT_SIZES[quantization]
    if 0 in shape or shape[-1] % block:
        raise CheckpointError(f"{where} is {list(shape)}, expected rows of a multiple of {block} numbers")
    row_bytes = shape[-1] // block * block_bytes
    n_bytes = math.prod(shape[:-1]) * row_bytes
    if offset + n_bytes > len(data):
        raise CheckpointError(f"{where} is said to be {n_bytes:,} bytes at {offset:,}, but there are {len(data):,}: cut off?")
    raw = data[offset : offset + n_bytes]
    if kind in PLAIN:
        return Tensor.of(raw.view(PLAIN[kind]).reshape(shape))
    if len(shape) != 2:
        raise CheckpointError(f"{where} is {quantization.name} {list(shape)}, expected a matrix")
    by_row, name = raw.reshape(shape[0], row_bytes), quantization.name
    if name not in BLOCKS:
        if sys.byteorder == "big":
            raise CheckpointError(
                f"{where} is {name}, which the package gguf dequantises on little-endian machines only: convert it on one, the "
                "model directory is right on any"
            )
        rows = partial(_dequantised, library, quantization, by_row)
        return Tensor(shape, np.dtype(np.float32), rows, undone=name)
    return Tensor.of_grouped(shape, BLOCKS[name][0], lambda start, stop: grouped(name, by_row[start:stop], block_bytes))


def _can_undo(library: ModuleType, quantization: IntEnum) -> bool:
    """Return whether the library can dequantise a kind, by trying a block of zeros."""
    try:
        library.dequantize(np.zeros((1, library.GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
    except (NotImplementedError, KeyError):
        return False
    return True


def _dequantised(library: ModuleType, quantization: IntEnum, raw: np.ndarray, start: int, stop: int) -> np.ndarray:
    return np.asarray(library.dequantize(raw[start:stop], quantization), np.float32)


def _import_library() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise CheckpointError("a GGUF file needs the package gguf: pip install 'npllama[convert]'") from None
