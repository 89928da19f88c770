"""Represent a checkpoint as tensors read in blocks of rows, and write it as a model directory. All readers share this module.

A reader opens its files, refuses what isn't a plain Llama before it touches a weight, and returns a Source. write() streams
it: files are memory-mapped and never read whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from npllama import checkpoint
from npllama.checkpoint import CheckpointError, Storage, writing
from npllama.config import (
    EPS_RANGE,
    FACTOR_RANGE,
    Config,
    ConfigError,
    RopeScaling,
    check_number,
    check_whole,
    n_parameters,
    parameter_shapes,
)
from npllama.engine.grouped import INT4, Grouped, Grouping
from npllama.engine.memory import size_text
from npllama.engine.ranks.shares import Share, parts_of
from npllama.engine.weights import native, widen
from npllama.errors import shown
from npllama.tokenizer import Tokenizer, load_tokenizer

Report = Callable[[str], object]
Shaped = TypeVar("Shaped", np.ndarray, "Tensor")
T = TypeVar("T")
LLAMA3_CONTEXT = 8192  # what Llama 3 was trained on, before its frequencies were scaled

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # BOS and EOS by name

# Tensors of a checkpoint that are not parameters: rotary tables and caches that some releases saved too.
NOT_A_PARAMETER = re.compile(r"(.*\.)?(rope\.freqs|freqs_cis|freqs_cos|freqs_sin|cache_k|cache_v|rotary_emb\.inv_freq)")
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")


# ------------------------------------------------------------------------------------------------------------------ a source


@dataclass(frozen=True)
class Tensor:
    """Hold a parameter's shape and dtype, and read it in blocks of rows: it is never in memory whole."""

    shape: tuple[int, ...]
    dtype: np.dtype  # uint16 is bfloat16
    rows: Callable[[int, int], np.ndarray]  # rows start to stop
    grouping: Grouping | None = None  # its quantisation, if it has one
    quantised: Callable[[int, int], Grouped] | None = None  # the same rows, still quantised
    undone: str = ""  # a quantisation that npllama can't store, undone while reading

    @classmethod
    def of(cls, array: np.ndarray, order: np.ndarray | None = None) -> Tensor:
        """Wrap a (mapped) array, its rows reordered if an order is given; rows are read in native byte order."""
        dtype = array.dtype.newbyteorder("=")
        if order is None:
            return cls(array.shape, dtype, lambda start, stop: native(array[start:stop]))
        return cls(array.shape, dtype, lambda start, stop: native(array[order[start:stop]]))

    @classmethod
    def of_grouped(cls, shape: tuple[int, ...], grouping: Grouping, quantised: Callable[[int, int], Grouped]) -> Tensor:
        """Wrap a matrix that the source has quantised in groups; --dtype auto stores it unchanged.

        quantised   gives the rows from start to stop, made by Grouped.of(grouping, q, scale, unit)

        Raises ValueError if a matrix of this shape can't be quantised so.
        """
        grouping.check(shape)
        return cls(shape, np.dtype(np.float32), lambda start, stop: quantised(start, stop).widen(), grouping, quantised)

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Return some rows and columns, still quantised."""
        if rows == columns == slice(None):
            return self
        first, last, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(self.shape[-1])
        shape = (last - first, right - left)

        def read(start: int, stop: int) -> np.ndarray:
            return self.rows(first + start, first + stop)[:, left:right]

        if self.grouping is None or self.quantised is None:
            return Tensor(shape, self.dtype, read)
        quantised, part = self.quantised, slice(left, right)
        grouping = quantised(first, first + 1).columns(part).grouping  # of smaller groups, where these are cut
        return Tensor(shape, self.dtype, read, grouping, lambda a, b: quantised(first + a, first + b).columns(part))

    def parts(self) -> Iterator[slice]:
        """Return the ranges of consecutive blocks of rows, each of at most BLOCK_BYTES or a single row."""
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        step = max(1, writing.BLOCK_BYTES // max(1, row_bytes))
        return (slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step))

    def blocks(self) -> Iterator[np.ndarray]:
        """Return the whole as consecutive blocks of rows."""
        with np.errstate(all="ignore"):  # numbers that aren't finite are refused, with the tensor's name, when they are written
            yield from (self.rows(part.start, part.stop) for part in self.parts())

    def quantised_blocks(self) -> Iterator[Grouped]:
        """Return the whole as consecutive blocks of quantised rows; of_grouped() made it."""
        if self.quantised is not None:
            yield from (self.quantised(part.start, part.stop) for part in self.parts())

    def same_bits(self, other: Tensor) -> bool:
        """Return whether both hold the same numbers in the same dtype, 0.0 and -0.0 being different."""
        same = self.shape == other.shape and self.dtype == other.dtype
        return same and all(map(same_bits, self.blocks(), other.blocks()))

    def same_values(self, other: Tensor) -> bool:
        """Return whether both hold the same numbers, in any dtype."""

        def wide(tensor: Tensor, part: slice) -> np.ndarray:
            return widen(tensor.rows(part.start, part.stop)).astype(np.float64)

        return self.shape == other.shape and all(same_bits(wide(self, part), wide(other, part)) for part in self.parts())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays are equal bit for bit."""
    bits = np.dtype(f"u{a.itemsize}")
    return a.dtype == b.dtype and np.array_equal(np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits))


@dataclass
class Source:
    """Describe a checkpoint; no weight is read yet."""

    kind: str
    config: Config
    tensors: dict[str, Tensor]  # in Meta's layout, named as in parameter_shapes(config)
    files: list[Path]  # files whose sha256 goes into the manifest
    tokenizer: dict[str, Path | bytes] = field(default_factory=dict)  # the tokenizer's files, chat templates
    generation: dict[str, object] = field(default_factory=dict)  # recommended chat_format, system, temperature, top_p
    about: dict[str, object] = field(default_factory=dict)  # further entries for the manifest


def tie(config: Config, tensors: dict[str, Tensor], report: Report) -> tuple[Config, dict[str, Tensor]]:
    """Leave out an output matrix that equals the embedding: it is stored once."""
    if config.tied_embeddings:
        report("tied embeddings: there is no output matrix")
        return config, tensors
    output, embedding = tensors["output.weight"], tensors["tok_embeddings.weight"]
    if output.dtype == embedding.dtype:
        how = "bit for bit" if output.same_bits(embedding) else None
    else:
        how = f"in value, as {_name(output)} and {_name(embedding)}" if output.same_values(embedding) else None
    if how:
        report(f"tied embeddings: output.weight equals the embedding {how}, and is stored once")
        tensors = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
        config = dataclasses.replace(config, tied_embeddings=True)
    return config, tensors


def _name(tensor: Tensor) -> str:
    return "bfloat16" if tensor.dtype == np.uint16 else tensor.dtype.name


def without_wrappers(where: object, found: Mapping[str, T]) -> dict[str, T]:
    """Remove the name prefixes that torch.compile and data parallelism add during training."""
    names = {name: WRAPPERS.sub("", name) for name in found}
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{where}: names differ by the prefixes module. and _orig_mod. alone, expected each tensor once")
    return {names[name]: tensor for name, tensor in found.items()}


def without_biases(where: object, found: Mapping[str, Shaped | None], report: Report) -> dict[str, Shaped | None]:
    """Leave out biases that are zero, since they change no result. Raises CheckpointError for any other bias."""
    biases = {name: tensor for name, tensor in found.items() if name.endswith(".bias") and tensor is not None}
    for name, tensor in sorted(biases.items()):
        if any(widen(native(block)).any() for block in (tensor.blocks() if isinstance(tensor, Tensor) else [tensor])):
            raise CheckpointError(f"{where}: {name}: Llama has no biases, and npllama does not compute them: it is not zero")
    if biases:
        report(f"left out: {len(biases)} bias{'es' * (len(biases) > 1)}, all zero")
    return {name: tensor for name, tensor in found.items() if name not in biases}


def report_left_out(names: Iterable[str], report: Report) -> None:
    """Report the tensors that are not parameters."""
    if left_out := {re.sub(r"\d+", "N", name, count=1) for name in names}:
        report(f"left out, not parameters: {', '.join(sorted(left_out))}")


def match(
    where: object, config: Config, names: Mapping[str, str], found: Mapping[str, Shaped | None], report: Report
) -> dict[str, Shaped]:
    """Find every parameter of the config among arrays or tensors that have other names, and check its shape.

    names    ours -> theirs, with N for the layer's number: layers.N.ffn_norm.weight -> blk.N.ffn_norm.weight

    Raises CheckpointError for a tensor that is missing, unexpected or of another shape.
    """
    if config.n_layers > len(found):  # checked before parameter_shapes creates the names of all announced layers
        raise CheckpointError(f"{where}: {config.n_layers} layers are announced, but there are only {len(found)} tensors")
    shapes = parameter_shapes(config)
    theirs = {name: _renamed(name, names) for name in shapes}
    found = without_biases(where, found, report)
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None and not NOT_A_PARAMETER.fullmatch(name)}
    report_left_out(found.keys() - tensors.keys(), report)
    checkpoint.check_names(where, theirs.values(), tensors)
    for name, shape in shapes.items():
        if tensors[theirs[name]].shape != shape:
            raise CheckpointError(f"{where}: {theirs[name]} is {list(tensors[theirs[name]].shape)}, expected {list(shape)}")
    return {name: tensors[theirs[name]] for name in shapes}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    number = re.match(r"layers\.(\d+)\.", name)
    return names[re.sub(r"\d+", "N", name, count=1)].replace("N", number[1]) if number else names[name]


# ------------------------------------------------------------------------------------------- the constants that a file states


def whole(known: Mapping[str, object], key: str) -> int:
    """Return a positive whole number among a file's values; ConfigError if it is missing or another value."""
    if key not in known:
        raise ConfigError(f"missing {key}")
    return check_whole(key, known[key])


def number(known: Mapping[str, object], key: str) -> float:
    """Return a positive finite number among a file's values; ConfigError if it is missing or another value."""
    if key not in known:
        raise ConfigError(f"missing {key}")
    return check_number(key, known[key], (EPS_RANGE[0], FACTOR_RANGE[1]))  # the Config knows the limits of each


def head_sizes(
    known: Mapping[str, object], dim: str, heads: str, kv_heads: str, head_dim: str, report: Report
) -> tuple[int, int, int]:
    """Return n_heads, n_kv_heads and head_dim from the keys that state them; the last two are inferred where absent."""
    n_heads = whole(known, heads)
    if kv_heads in known:
        n_kv_heads = whole(known, kv_heads)
    else:
        n_kv_heads = n_heads
        report(f"n_kv_heads: {n_heads} (inferred: as n_heads)")
    if head_dim in known:
        return n_heads, n_kv_heads, whole(known, head_dim)
    width = whole(known, dim)
    if width % n_heads:
        raise ConfigError(f"{dim} {width} is not a multiple of {heads} {n_heads}")
    return n_heads, n_kv_heads, width // n_heads


def refuse_foreign(known: Mapping[str, object], pattern: re.Pattern[str]) -> None:
    """Raise ConfigError for a key that means another architecture, unless it is null, false, 0, -1 or empty."""
    for key, value in known.items():
        if pattern.fullmatch(key) and value is not None and value not in (False, 0, -1, "", [], {}):
            raise ConfigError(f"{key} is {shown(value)}: an architecture that npllama does not compute")


def within_window(known: Mapping[str, object], key: str, context: int, report: Report) -> int:
    """Return the context length, cut to the attention's sliding window if there is one: then every key is within the window."""
    window = known.get(key)
    if window is None or window in (False, 0, -1) or known.get("use_sliding_window") is False:
        return context
    if type(window) is int and window >= context:
        report(f"{key}: {window}, which never acts in a context of {context}")
        return context
    window = whole(known, key)
    report(f"max_seq_len: {window} instead of {context} (cut to {key}, which npllama does not compute: it never acts there)")
    return window


def llama3_scaling(factor: float) -> RopeScaling:
    """Return the RoPE scaling of Llama 3.1 and later models, which differ only in the factor."""
    return RopeScaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=LLAMA3_CONTEXT)


# ----------------------------------------------------------------------------------------------------- tokenizer and settings


def read_generation(
    folder: Path, config: Config, report: Report, config_file: Mapping[str, object] | None = None
) -> tuple[dict[str, object], dict[str, bytes]]:
    """Read the recommended temperature and top_p from generation_config.json, where there is one.

    Returns them, and the generation_config.json to store if the folder's own has no `eos_token_id`: as in Hugging Face, that of
    config.json, whose values are config_file, then counts.

    A recommendation that can't be followed is left out and reported, ids that end an answer included (the tokenizer, which
    reads them, leaves out the same ones).
    """
    path, files = folder / "generation_config.json", {}
    values = checkpoint.read_json(path) if path.exists() else {}
    if values.get("eos_token_id") is None and (eos := (config_file or {}).get("eos_token_id")) is not None:
        values["eos_token_id"] = eos
        files[path.name] = (json.dumps(values, indent=2) + "\n").encode()
        path = folder / "config.json"
    for key in ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"):
        ids = values.get(key)
        for id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if type(id) is not int or not 0 <= id < config.vocab_size:
                report(f"{path}: {key} is {shown(id)}, expected 0 to {config.vocab_size - 1}: left out")
    settings = {key: value for key, value in values.items() if key in ("temperature", "top_p")}
    return recommended(folder / "generation_config.json", settings, report), files


def recommended(where: object, values: Mapping[str, object], report: Report) -> dict[str, object]:
    """Return the settings that generate accepts; others are reported and left out."""
    for key, value in values.items():
        if expected := checkpoint.setting_fault(key, value):
            report(f"{where}: {key} is {shown(value)}, expected {expected}: left out")
    return {key: value for key, value in values.items() if not checkpoint.setting_fault(key, value)}


@dataclass(frozen=True)
class TokenizerChoice:
    """Choose the tokenizer that a model gets: the source's own, another file, or none."""

    file: Path | None = None
    leave_out: bool = False

    def of(self, own: Path | None) -> Path | None:
        """Return the file to take, given the source's own."""
        return None if self.leave_out else self.file or own


OWN = TokenizerChoice()


def add_tokenizer(source: Source, file: Path, report: Report) -> Tokenizer | None:
    """Add a tokenizer's file and its companion files; return the tokenizer, or None where its package is missing."""
    with open(file, "rb") as opened:
        name = "tokenizer.json" if opened.read(1) == b"{" else "tokenizer.model"
    names = COMPANIONS if name == "tokenizer.json" else (*COMPANIONS, "added_tokens.json")
    companions = [path for path in map(file.with_name, names) if path.is_file()]
    source.tokenizer = {name: file, **{path.name: path for path in companions}, **source.tokenizer}
    source.files += [file, *companions]
    return check_tokenizer(file, source.config, report)


def check_tokenizer(path: Path, config: Config, report: Report) -> Tokenizer | None:
    """Check the tokenizer's size against the vocabulary; return the tokenizer, or None where its package is missing."""
    with open(path, "rb") as file:
        needs = {b"\n": "sentencepiece", b"{": "tokenizers"}.get(file.read(1))
    if needs and importlib.util.find_spec(needs) is None:
        report(f"{path.name} is not checked: the package {needs} is not installed")
        return None
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > 2 * config.vocab_size:  # more than padding or added tokens can explain
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} tokens, but the model's vocabulary {config.vocab_size}: is it another model's?"
        )
    if tokenizer.vocab_size > config.vocab_size:
        report(
            f"{path.name} has {tokenizer.vocab_size} tokens, the model {config.vocab_size} rows: "
            f"ids from {config.vocab_size} on are never generated, and refused in a prompt"
        )
    if tokenizer.vocab_size < config.vocab_size:
        report(f"{path.name} has {tokenizer.vocab_size} tokens of the model's {config.vocab_size}")
    return tokenizer


# --------------------------------------------------------------------------------------------------------------------- write


DTYPES = ("auto", *checkpoint.STORAGE, "int4")


def check_dtype(dtype: str) -> None:
    """Raise CheckpointError for an unknown --dtype."""
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")


def write(
    source: Source,
    dst: str | Path,
    dtype: str = "auto",
    force: bool = False,
    report: Report = print,
    share: Share | None = None,
) -> None:
    """Write the model directory `dst` atomically; only one rank's share, if one is given.

    dtype   float32, float16, bfloat16, int8 or int4 (the embedding and the norms as auto), or auto for each tensor's own,
            quantised ones included
    force   replace `dst` if it is a model directory

    Raises CheckpointError, or another ValueError, with one line. A progress bar goes to standard error if that is a terminal.
    """
    started, dst = time.monotonic(), Path(dst)
    check_dtype(dtype)
    tied = source.config.tied_embeddings
    dtypes, tensors = {name: _storage(name, tensor, dtype, tied) for name, tensor in source.tensors.items()}, source.tensors
    if share is not None:
        parts = parts_of(source.config, share)
        tensors = {name: tensors[whole].part(rows, columns) for name, (whole, rows, columns) in parts.items()}
        dtypes = {name: _storage(whole, tensors[name], dtype, tied) for name, (whole, _, _) in parts.items()}
    n_bytes = sum(checkpoint.stored_bytes(tensor.shape, dtypes[name]) for name, tensor in tensors.items())
    if not source.tokenizer:
        report("no tokenizer: the model takes and gives token ids only")
    about: dict[str, object] = {"kind": source.kind, **source.about}
    with (
        checkpoint.create(dst, source.config, dtypes, about, force, source.generation, share) as writer,
        _hashed(source.files) as digests,
        progress_bar(n_bytes) as writer.progress,
    ):
        for name, tensor in tensors.items():
            writer.add_blocks(name, tensor.quantised_blocks() if _is_stored_as(tensor, dtypes[name]) else tensor.blocks())
        for name, content in source.tokenizer.items():
            writer.add_file(name, content)
        about["files"] = digests()
    kinds = {f"{kind.bits} bits in groups" if isinstance(kind, Grouping) else kind for kind in dtypes.values()}
    used, size = " and ".join(sorted(kinds)), size_text(n_bytes)
    report(f"{dst}: {n_parameters(source.config):,} parameters, {used}, {size}, {time.monotonic() - started:.1f} s")


def _is_stored_as(tensor: Tensor, storage: Storage) -> bool:
    """Return whether a tensor is quantised in the form in which it will be stored, whatever the order of the file's axes."""
    if tensor.grouping is None or not isinstance(storage, Grouping):
        return False
    return dataclasses.replace(tensor.grouping, rows_first=False) == dataclasses.replace(storage, rows_first=False)


def _storage(name: str, tensor: Tensor, dtype: str, tied: bool) -> Storage:
    """Return the storage of a tensor for this --dtype.

    An embedding that is not the output matrix too is stored row by row: a few of its rows are read, and none is multiplied.
    """
    if dtype == "int4" and checkpoint.takes_int8(name) and tensor.shape[-1] % INT4.group == 0:
        return INT4
    if dtype not in ("auto", "int4") and (dtype != "int8" or checkpoint.takes_int8(name)):
        return dtype
    if tensor.grouping is not None:
        return dataclasses.replace(tensor.grouping, rows_first=name == "tok_embeddings.weight" and not tied)
    for storage, stored in checkpoint.STORAGE.items():
        if tensor.dtype == stored:
            return storage
    raise CheckpointError(f"{name} is {tensor.undone or tensor.dtype}, which is not stored: choose a --dtype")


@contextlib.contextmanager
def _hashed(files: Iterable[Path]) -> Iterator[Callable[[], dict[str, object]]]:
    """Hash files on a second thread during the conversion; the function that it yields waits for the results."""
    results: dict[str, object] = {}
    failures: list[Exception] = []
    stop = threading.Event()

    def work() -> None:
        try:
            for file in files:
                results[file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint.sha256(file, stop.is_set)}
        except Exception as error:
            failures.append(error)

    def finish() -> dict[str, object]:
        thread.join()
        if failures:
            raise failures[0]
        return results

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield finish
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def progress_bar(total: int, doing: str | None = None) -> Iterator[Callable[[int], object] | None]:
    """Yield a function that advances a progress bar by a number of bytes; None if standard error isn't a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=doing, unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield bar.update
