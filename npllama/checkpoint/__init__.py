"""The model directory: one .npy file per parameter, config.json, manifest.json and the tokenizer. Written whole or not at all,
opened memory-mapped, verified by sha256.

An array of dtype uint16 is bfloat16 here, on disk as in memory: NumPy has none, and its upper-half-of-a-float32 bits are exact.
An int8 array has the float32 scales of its rows in a .scale.npy beside it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import importlib.resources
import io
import json
import logging
import math
import mmap
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..config import Config, ConfigError, n_parameters, parameter_shapes
from ..engine import layout
from ..engine.memory import address_space, available_memory, free_memory, size_text
from ..engine.weights import Int8, Weight, is_packed, native, to_bfloat16, to_int8, widen
from ..errors import NpllamaError, shown
from ..scope import Ops
from . import foreign
from .atomic import check_target, new_folder, not_ours, survivor, writing
from .foreign import JSON_LIMIT as JSON_LIMIT
from .store import NAME, locate

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

FORMAT_VERSION = 1
STORAGE = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "int8": np.dtype("i1")}
BLOCK_BYTES = 1 << 18  # what is converted, checked, hashed and written at once: small enough for a core's cache
WRITE_BYTES = 1 << 16  # at once: the page cache makes folios as large as a write is, and large ones can take it long to find
BLOCKS_AHEAD = 4  # how many blocks the hashing may be behind the writing
MANIFEST_SECTIONS = {
    "tensors": {"file": str, "dtype": str, "shape": list, "bytes": int, "sha256": str},
    "files": {"bytes": int, "sha256": str},
}
SCALE_KEYS = {"file": str, "bytes": int, "sha256": str}  # of a tensor's "scale", which int8 has
# The largest float32 but one: the scale of the largest may round to more than a 127th of it, and the product to infinity.
INT8_LIMIT = np.nextafter(np.finfo(np.float32).max, np.float32(0))
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

log = logging.getLogger(__name__)
logging.getLogger("npllama").addHandler(logging.NullHandler())  # without it, warnings would go to standard error


class CheckpointError(NpllamaError):
    """A checkpoint can't be read or written; the message is one line: the file, what was found and what was expected."""


# ------------------------------------------------------------------------------------------------------------------ reading


@dataclass(eq=False, repr=False)
class Model:
    """A model in memory, or mapped from its directory."""

    config: Config
    params: dict[str, Weight]  # as config.parameter_shapes names them
    generation: dict[str, object] = field(default_factory=dict)  # recommended chat_format, system, temperature, top_p, or None
    path: Path | None = None
    manifest: dict[str, object] = field(default_factory=dict)
    ops: Ops | None = None  # what generation and perplexity run it with; None: what forward() chooses

    def __repr__(self) -> str:
        return f"<npllama.Model {self.path}: {n_parameters(self.config):,} parameters>"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with the model, or None."""
        for name in TOKENIZER_FILES:
            if name in self.manifest.get("files", {}):
                from ..tokenizer import load_tokenizer

                return load_tokenizer(self.path / name)
        return None


def demo_path() -> Path:
    """The model that ships inside the package; where that is inside a zip (zipapp), a copy for the life of this process."""
    path = Path(__file__).resolve().parent.parent / "demo"
    return path if path.is_dir() else _unpacked_demo()


@functools.cache
def _unpacked_demo() -> Path:
    """Files inside a zip can't be mapped."""
    inside = importlib.resources.files("npllama") / "demo"
    if not inside.is_dir():
        raise CheckpointError("the embedded model is missing from this copy of npllama: expected a model directory with -m")
    folder, owner = Path(tempfile.mkdtemp(prefix="npllama-demo-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not a child that was forked
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    for file in inside.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def load(path: str | Path | None = None, dtype: str = "auto") -> Model:
    """Open a model directory, by its path or its name in the store, to compute with; without one, the embedded demo model.

    dtype "auto"     float32, if what that takes fits in half of the free memory, else "stored"
          "stored"   weights stay as they are on disk, memory-mapped: linear() widens packed ones tile by tile
          "float32", "float64"   in memory, where they aren't that and at their best already (layout.py)

    Vectors (the norms' weights) are always widened. What it decided, and why, goes to the logger `npllama`. Raises
    CheckpointError or ConfigError, both ValueError.

    Mapped files must stay as they are while the model is in use: reading what another program has cut off ends the process with
    the signal SIGBUS, which Python can't catch. Replacing the whole directory, as convert --force does, is safe.
    """
    if dtype not in ("auto", "stored", "float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}, expected auto, stored, float32 or float64")
    model = open_model(demo_path() if path is None else path)
    if dtype == "auto":
        needed, free = layout.new_bytes(model.params, model.config, np.float32), available_memory()
        fits = needed <= free // 2
        dtype = "float32" if fits else "stored"
        if any(map(is_packed, model.params.values())):
            sizes = size_text(needed), size_text(free)
            if fits:
                log.info("weights widened to float32, whose %s fit in half of the free %s", *sizes)
            else:
                log.warning("weights stay as stored: in float32 they take %s, more than half of the free %s", *sizes)
    if dtype == "stored":
        for name, array in model.params.items():
            model.params[name] = widen(array) if array.ndim == 1 else array
        _read_ahead(model)
    else:
        model.params = layout.in_memory(model.params, model.config, dtype)
    return model


def _read_ahead(model: Model) -> None:
    """Tell the system how the mapped weights will be read, and log a warning where they don't fit into memory.

    Weights that fit are asked for at once, in the order they are used, on another thread: computing then overlaps with the
    disk's reading. What doesn't fit is read anew for every token, and the system is told not to keep what was read.
    """
    if not hasattr(mmap.mmap, "madvise"):  # Windows
        return
    maps = [m for weight in model.params.values() if (m := _mapping(weight)) is not None]
    n_bytes, free = sum(map(len, maps)), free_memory()
    fits = n_bytes <= free
    advice = mmap.MADV_WILLNEED if fits else mmap.MADV_SEQUENTIAL

    def advise() -> None:
        for mapping in maps:
            with contextlib.suppress(OSError, ValueError):  # it is advice; ValueError: closed meanwhile
                mapping.madvise(advice)

    threading.Thread(target=advise, daemon=True, name="npllama-read-ahead").start()
    if not fits:
        sizes = size_text(n_bytes), size_text(free)
        log.warning("the weights take %s, but %s are free: each token reads them from the disk again", *sizes)


def _mapping(weight: Weight) -> mmap.mmap | None:
    base = (weight.values if isinstance(weight, Int8) else weight).base
    return getattr(base, "_mmap", None)


def open_model(path: str | Path) -> Model:
    """Map every parameter exactly as it is stored; names, shapes, dtypes and sizes are checked, their content is not.

    A folder that another run replaces meanwhile is opened anew: its files would be those of two models.
    """
    for _ in range(100):
        folder = survivor(locate(path))
        before = _identity(folder)
        try:
            model = _open(folder)
        except CheckpointError:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return model
    raise CheckpointError(f"{folder} is replaced again and again while it is opened")


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _open(path: Path) -> Model:
    if not path.is_dir():
        raise _no_directory(path)
    manifest = _read_manifest(path)
    config, generation = _read_config(path)
    tensors = manifest["tensors"]
    if config.n_layers > len(tensors):  # before parameter_shapes makes as many names as config.json pleases
        raise CheckpointError(
            f"{path / 'config.json'}: n_layers is {config.n_layers}, manifest.json lists {len(tensors)} tensors"
        )
    shapes = parameter_shapes(config)
    check_names(path / "manifest.json", shapes, tensors)
    for name in manifest["files"]:
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
    arrays = _array_files(tensors)
    if (n_bytes := sum(entry["bytes"] for entry in arrays.values())) > (limit := address_space()):
        why = "a 64-bit Python has no such limit" if sys.maxsize < 1 << 32 else "`ulimit -v` sets that limit"
        raise CheckpointError(
            f"{path}: the weights take {size_text(n_bytes)}, but this process can address {size_text(limit)}: {why}"
        )
    _allow_open_files(len(arrays))
    params = {name: _map_tensor(path, name, tensors[name], shape) for name, shape in shapes.items()}
    return Model(config, params, generation, path, manifest)


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Hash every file again and return the problems, one line each; none means that all is as it was written.

    progress(done, total) is called with byte counts on the way. Files that the manifest doesn't list are left alone, except for
    an .npy, which could be taken for a parameter. Raises CheckpointError if `path` is not a model directory at all.
    """
    path = survivor(locate(path))
    manifest = _read_manifest(path)
    listed = _array_files(manifest["tensors"]) | manifest["files"]
    total, done, problems = sum(entry["bytes"] for entry in listed.values()), 0, []
    for name, entry in listed.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif (size := file.stat().st_size) != entry["bytes"]:
            problems.append(f"{file} is {size:,} bytes, expected {entry['bytes']:,}")
        elif (digest := sha256(file)) != entry["sha256"]:
            problems.append(f"{file} is altered: its sha256 is {digest}, expected {entry['sha256']}")
        done += entry["bytes"]
        if progress:
            progress(done, total)
    problems += [f"{file} is not in manifest.json" for file in sorted(path.glob("*.npy")) if file.name not in listed]
    if not problems:
        try:
            open_model(path)
        except ValueError as error:
            problems.append(str(error))
    return problems


def sha256(path: Path, stop: Callable[[], bool] = lambda: False) -> str:
    """The file's sha256 in hexadecimal; `stop` is asked after every block whether to give up early."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while (n := file.readinto(block)) and not stop():
            digest.update(memoryview(block)[:n])
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """Read the JSON object in a file; CheckpointError if there is none, or it exceeds JSON_LIMIT."""
    return foreign.read_json(path, CheckpointError)


def _no_directory(path: Path) -> CheckpointError:
    expected = "expected a model directory"
    if path.exists():
        return CheckpointError(f"{path}: a file, {expected} (npllama convert makes one of a checkpoint)")
    names = ", and no name that `npllama models` lists" if NAME.fullmatch(str(path)) else ""
    return CheckpointError(f"{path}: not found{names}, {expected}")


def _read_manifest(path: Path) -> dict[str, object]:
    file = path / "manifest.json"
    if not path.is_dir():
        raise _no_directory(path)
    if not file.exists():
        raise CheckpointError(f"{path} is not a model directory: it has no manifest.json (npllama convert makes one)")
    manifest = read_json(file)
    version = manifest.get("npllama_format")
    if type(version) is not int:
        raise CheckpointError(f"{file} is not npllama's: npllama_format is {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, this npllama reads up to {FORMAT_VERSION}: upgrade npllama"
        )
    for section, keys in MANIFEST_SECTIONS.items():
        entries = manifest.get(section)
        if not isinstance(entries, dict):
            raise CheckpointError(f"{file}: {section} is {type(entries).__name__}, expected an object")
        for name, entry in entries.items():
            _check_entry(f"{file}: {section}: {name!r}", entry, keys)
            named = [entry["file"] if section == "tensors" else name]
            if section == "tensors" and entry["dtype"] == "int8":
                _check_entry(f"{file}: {section}: {name!r}: scale", entry.get("scale"), SCALE_KEYS)
                named.append(entry["scale"]["file"])
            if not all(map(is_plain_name, named)):
                raise CheckpointError(f"{file}: {section}: {name!r} names a file outside the directory")
    return manifest


def _check_entry(where: str, entry: object, keys: Mapping[str, type]) -> None:
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in keys.items()):
        raise CheckpointError(f"{where}: expected an object with {', '.join(keys)}")


def _array_files(tensors: Mapping[str, Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
    """Every .npy that the manifest's tensors are in, those of scales too, with its size and hash."""
    entries = [part for t in tensors.values() for part in ([t, t["scale"]] if t["dtype"] == "int8" else [t])]
    return {entry["file"]: entry for entry in entries}


def is_plain_name(name: str) -> bool:
    """Whether this names a file in a folder itself, on any system: no separator, drive, `..` or NUL, and not too long."""
    if name in ("", ".", "..") or "\0" in name or len(name) > 255:
        return False
    return PurePosixPath(name).name == name == PureWindowsPath(name).name


def _read_config(path: Path) -> tuple[Config, dict[str, object]]:
    file = path / "config.json"
    values = read_json(file)
    try:
        generation = _check_generation(values.pop("generation", {}))
        return Config.from_dict(values), generation
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _check_generation(values: object) -> dict[str, object]:
    """Recommended settings with every key present, None where there is no recommendation."""
    defaults = {"chat_format": None, "system": None, "temperature": None, "top_p": None}
    if not isinstance(values, Mapping) or not set(values) <= set(defaults):
        raise ConfigError(f"generation is {shown(values)}, expected an object of {', '.join(defaults)}")
    settings = defaults | dict(values)
    for name, value in settings.items():
        if expected := setting_fault(name, value):
            raise ConfigError(f"generation: {name} is {shown(value)}, expected {expected}")
    return settings


def setting_fault(name: str, value: object) -> str | None:
    """Say what is expected of a recommended setting that generate would refuse; None if the value is right."""
    if value is None:
        return None
    if name in ("chat_format", "system"):
        return None if isinstance(value, str) else "a text or null"
    number = float(value) if type(value) is float or (type(value) is int and abs(value) < 1 << 64) else math.nan
    if name == "temperature":
        return None if 0 <= number < math.inf else "a number from 0"
    return None if 0 < number <= 1 else "a number above 0 and up to 1"


def check_names(where: object, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise a CheckpointError that says which names are missing or unexpected."""
    expected, found = list(expected), set(found)
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{where}: {_some(missing)} missing")
    if unknown := sorted(found.difference(expected)):
        raise CheckpointError(f"{where}: {_some(unknown)} unexpected")


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") + (" are" if len(names) > 1 else " is")
    )


def takes_int8(name: str) -> bool:
    """Whether a parameter of this name can be quantized: the layers' matrices and a separate output matrix can.

    Norms stay as they were, and so does the embedding, whose rows are read and not multiplied, tied or not.
    """
    return not name.endswith(("norm.weight", "tok_embeddings.weight"))


def _map_tensor(path: Path, name: str, entry: Mapping[str, object], shape: tuple[int, ...]) -> Weight:
    if tuple(entry["shape"]) != shape:
        raise CheckpointError(f"{path / 'manifest.json'}: {name} is {entry['shape']}, expected {list(shape)} by config.json")
    known = [dtype for dtype in STORAGE if dtype != "int8" or takes_int8(name)]
    if entry["dtype"] not in known:
        raise CheckpointError(f"{path / 'manifest.json'}: {name} has dtype {entry['dtype']!r}, expected {', '.join(known)}")
    array = _map_array(path / entry["file"], entry["bytes"], STORAGE[entry["dtype"]], shape)
    if entry["dtype"] != "int8":
        return array
    scale = entry["scale"]
    return Int8(array, _map_array(path / scale["file"], scale["bytes"], STORAGE["float32"], shape[:1]))


def _map_array(file: Path, n_bytes: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        size = file.stat().st_size
        if size != n_bytes:
            raise CheckpointError(f"{file} is {size:,} bytes, expected {n_bytes:,}")
        array = foreign.read_npy(file, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran order"
        found = array.dtype.name if array.dtype == array.dtype.newbyteorder("<") else f"big-endian {array.dtype.name}"
        raise CheckpointError(f"{file} holds {found} {list(array.shape)}{order}, expected {dtype.name} {list(shape)}")
    return native(np.asarray(array))  # files are little-endian: on a big-endian machine this reads the file into memory


def _allow_open_files(n: int) -> None:
    """Each mapping keeps a file open, and macOS starts a process with a limit of 256: raise it as far as the system lets us."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


# ------------------------------------------------------------------------------------------------------------------ writing


def check_free(path: str | Path, force: bool = False) -> None:
    """Raise the ValueError that create() would for a path that is taken, before anything costly is begun."""
    check_target(Path(path).resolve(), force, _why_not_ours)


@contextlib.contextmanager
def create(
    path: str | Path,
    config: Config,
    dtype: str | Mapping[str, str],
    source: Mapping[str, object],
    force: bool = False,
    generation: Mapping[str, object] | None = None,
) -> Iterator[Writer]:
    """Write a model directory that appears at `path` complete, or not at all.

        with create("model", config, "bfloat16", source={"kind": "test"}) as writer:
            for name, array in weights.items():
                writer.add(name, array)
            writer.add_file("tokenizer.model", Path("tokenizer.model"))

    dtype       float32, float16 or bfloat16; or one for each parameter's name, which may be int8 where takes_int8(name)
    source      stored in the manifest; it may still be filled in until the block ends
    force       replace a model directory, or an empty folder; nothing else
    generation  recommended settings: chat_format, system (the prompt), temperature, top_p

    Raises CheckpointError, or another ValueError: before the first byte is written if the disk is too full for the parameters.
    """
    path = Path(path)
    shapes = parameter_shapes(config)
    dtypes = {name: dtype if isinstance(dtype, str) else dtype[name] for name in shapes}
    if unknown := set(dtypes.values()).difference(STORAGE):
        raise CheckpointError(f"dtype is {min(unknown)!r}, expected {', '.join(STORAGE)}")
    if refused := [name for name in shapes if dtypes[name] == "int8" and not takes_int8(name)]:
        raise CheckpointError(f"{refused[0]} is not quantized: its dtype is int8, expected float32, float16, bfloat16")
    generation = _check_generation(generation or {})
    headers = 128 * (len(dtypes) + list(dtypes.values()).count("int8"))
    needed = headers + sum(stored_bytes(shape, dtypes[name]) for name, shape in shapes.items())
    try:
        with new_folder(path, force, _why_not_ours) as folder:
            if needed > (free := shutil.disk_usage(folder).free):
                raise CheckpointError(
                    f"{path}: the model needs {size_text(needed)}, but only {size_text(free)} are free on that disk"
                )
            with ThreadPoolExecutor(max_workers=1) as hashing:  # one worker: it takes the blocks in their order
                writer = Writer(folder, path, shapes, dtypes, hashing)
                yield writer
                writer._finish(config, source, generation)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{path}: the disk is full; the model needs {size_text(needed)}. Nothing was left behind"
        ) from None


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """What the numbers of a parameter take on the disk, scales included."""
    scales = shape[0] * STORAGE["float32"].itemsize if dtype == "int8" else 0
    return math.prod(shape) * STORAGE[dtype].itemsize + scales


class Writer:
    """Takes a model's parameters in any order, tensor by tensor or block by block; made by create()."""

    progress: Callable[[int], object] | None = None  # set it to be called with the bytes just written

    def __init__(
        self,
        folder: Path,
        target: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
        hashing: Executor,
    ):
        self._folder, self._target = folder, target  # where it is made, and what it will be
        self._shapes, self._dtypes, self._hashing = shapes, dtypes, hashing
        self._tensors: dict[str, dict[str, object]] = {}
        self._files: dict[str, dict[str, object]] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Write a parameter given whole: float16, float32, float64, or uint16 holding the bits of bfloat16."""
        array = np.asarray(array)
        step = max(1, BLOCK_BYTES * len(array) // max(1, array.nbytes)) if array.ndim else 1
        self._check_shape(name, array.shape)
        self.add_blocks(name, (array[start : start + step] for start in range(0, len(array), step)))

    def add_blocks(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Write a parameter given as consecutive blocks of rows, so that it never is in memory whole.

        Values are rounded to nearest even where the storage is narrower. Raises CheckpointError, naming the tensor, for a wrong
        name or shape, a value that is not finite, and one that would overflow to infinity.
        """
        shape = self._shapes.get(name)
        self._check_shape(name, shape)
        dtype, n_rows, scales = self._dtypes[name], 0, []
        with self._new(f"{name}.npy") as file:
            stream = _NpyStream(file, shape, STORAGE[dtype], self._hashing)
            for block in blocks:
                if block.shape[1:] != shape[1:] or n_rows + len(block) > shape[0]:
                    raise CheckpointError(
                        f"{name}: rows {list(block.shape)} after {n_rows} others, expected {list(shape)} in all"
                    )
                data = _to_storage(block, dtype, name, n_rows)
                n_rows += len(block)
                if isinstance(data, Int8):
                    scales.append(data.scale)
                stream.write(data.values if isinstance(data, Int8) else data)
                if self.progress:
                    self.progress(data.nbytes)
        if n_rows != shape[0]:
            raise CheckpointError(f"{name} has {n_rows} rows, expected {shape[0]}")
        entry = {"file": f"{name}.npy", "dtype": dtype, "shape": list(shape), "bytes": stream.n_bytes, "sha256": stream.sha256}
        if scales:
            with self._new(f"{name}.scale.npy") as file:
                stream = _NpyStream(file, shape[:1], STORAGE["float32"], self._hashing)
                stream.write(np.concatenate(scales))
            entry["scale"] = {"file": f"{name}.scale.npy", "bytes": stream.n_bytes, "sha256": stream.sha256}
        self._tensors[name] = entry

    def add_file(self, name: str, content: bytes | str | Path) -> None:
        """Store another file unchanged: bytes, or a path to copy."""
        if not is_plain_name(name) or name.endswith(".npy") or name in ("manifest.json", *self._files):
            raise CheckpointError(f"{name!r} can't be added: expected a new plain file name")
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        with self._new(name) as file:
            file.write(data)
        self._files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _new(self, file: str) -> contextlib.AbstractContextManager[BinaryIO]:
        return writing(self._folder / file, self._target / file)

    def _check_shape(self, name: str, found: tuple[int, ...] | None) -> None:
        if name not in self._shapes:
            raise CheckpointError(f"{name} is not a parameter of this model")
        if name in self._tensors:
            raise CheckpointError(f"{name} is there twice")
        if found != self._shapes[name]:
            raise CheckpointError(f"{name} is {list(found)}, expected {list(self._shapes[name])}")

    def _finish(self, config: Config, source: Mapping[str, object], generation: dict[str, object]) -> None:
        check_names("the model", self._shapes, self._tensors)
        self.add_file("config.json", _json({**config.to_dict(), "generation": generation}))
        weights = [t for name, t in self._tensors.items() if takes_int8(name)]  # the matrices, without the embedding
        in_bytes = {dtype: sum(t["bytes"] for t in weights if t["dtype"] == dtype) for dtype in STORAGE}
        manifest = {
            "npllama_format": FORMAT_VERSION,
            "source": source,
            "dtype": max(in_bytes, key=in_bytes.get),
            "tensors": {name: self._tensors[name] for name in self._shapes},
            "files": self._files,
        }
        with self._new("manifest.json") as file:
            file.write(_json(manifest))


class _NpyStream:
    """Writes an .npy file block by block, and has it hashed meanwhile, on another thread."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, hashing: Executor):
        self._file, self._dtype, self._hashing, self._digest, self.n_bytes = file, dtype, hashing, hashlib.sha256(), 0
        self._behind: deque[Future[None]] = deque()
        self._put(_npy_header(shape, dtype))

    def write(self, block: np.ndarray) -> None:
        """Add the next rows, in the byte order that the header says. They are not to be changed afterwards."""
        self._put(np.ascontiguousarray(block, self._dtype).reshape(-1).view(np.uint8).data)

    @property
    def sha256(self) -> str:
        self._catch_up(0)
        return self._digest.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._catch_up(BLOCKS_AHEAD)
        self._behind.append(self._hashing.submit(self._digest.update, data))
        for start in range(0, len(data), WRITE_BYTES):
            self._file.write(data[start : start + WRITE_BYTES])
        self.n_bytes += len(data)

    def _catch_up(self, behind: int) -> None:
        while len(self._behind) > behind:
            self._behind.popleft().result()


def _float64_to_odd_float32(array: np.ndarray) -> np.ndarray:
    """Truncate to float32 and set the last bit where anything was lost, so that rounding to 16 bits later is exact."""
    narrow = array.astype(np.float32)
    bits = narrow.view(np.uint32)
    bits -= np.abs(narrow.astype(np.float64)) > np.abs(array)  # sign and magnitude: one less is one step towards zero
    bits |= narrow.astype(np.float64) != array
    return narrow


def _to_storage(block: np.ndarray, dtype: str, name: str, first_row: int) -> Weight:
    """The block in the dtype it is stored in, in this machine's byte order, contiguous and checked to be finite."""
    block = native(block)
    if block.dtype not in (np.uint16, np.float16, np.float32, np.float64):
        raise CheckpointError(f"{name} is {block.dtype}, expected float16, float32, float64, or uint16 for bfloat16")
    storage = STORAGE[dtype].newbyteorder("=")
    _refuse(_not_finite(block), block, name, first_row, "which is not finite")
    if dtype == "int8":
        wide = widen(block)
        _refuse(np.abs(wide) > INT8_LIMIT, wide, name, first_row, "too large for int8")
        return to_int8(wide)
    if block.dtype == storage:
        return np.ascontiguousarray(block)
    with np.errstate(over="ignore"):
        wide = widen(block)
        if dtype == "bfloat16":
            stored = to_bfloat16(_float64_to_odd_float32(wide) if wide.dtype == np.float64 else wide)
        else:
            stored = np.ascontiguousarray(wide, storage)
    _refuse(_not_finite(stored), wide, name, first_row, f"too large for {dtype}")
    return stored


def _not_finite(block: np.ndarray) -> np.ndarray:
    return (block & 0x7F80) == 0x7F80 if block.dtype == np.uint16 else ~np.isfinite(block)


def _refuse(bad: np.ndarray, values: np.ndarray, name: str, first_row: int, why: str) -> None:
    if bad.any():
        index = np.argwhere(bad)[0]
        value = widen(values[tuple(index)][None])[0]
        index[0] += first_row
        raise CheckpointError(f"{name}: the value at {index.tolist()} is {value!s}, {why}")


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _why_not_ours(path: Path) -> str | None:
    """What speaks against deleting the folder as one of our model directories."""
    try:
        manifest = _read_manifest(path)
    except ValueError as error:
        return str(error)
    listed = {"manifest.json", *manifest["files"], *_array_files(manifest["tensors"])}
    return not_ours(path, listed)
