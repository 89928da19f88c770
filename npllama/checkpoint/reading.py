"""Open a model directory: mapped as it is stored, or widened into memory."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.resources
import logging
import mmap
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import Config, n_parameters, parameter_shapes
from ..engine import layout, threads
from ..engine.grouped import Grouped, Grouping
from ..engine.memory import address_space, available_memory, free_memory, size_text
from ..engine.weights import Form, Int8, Weight, is_packed, native, widen
from ..errors import shown
from ..scope import Ops
from . import foreign
from .atomic import survivor
from .format import (
    GROUPED,
    STORAGE,
    TOKENIZER_FILES,
    CheckpointError,
    Manifest,
    array_files,
    check_names,
    no_directory,
    read_config,
    read_manifest,
    takes_int8,
)
from .store import locate

if TYPE_CHECKING:
    from ..engine.ranks.groups import Group
    from ..engine.ranks.leading import Part
    from ..engine.ranks.mpi import World
    from ..engine.ranks.passes import Spread
    from ..tokenizer import Tokenizer

log = logging.getLogger(__name__)
logging.getLogger("npllama").addHandler(logging.NullHandler())  # without it, warnings would go to standard error


@dataclass(eq=False, repr=False)
class Model:
    """A model in memory, or mapped from its directory."""

    config: Config
    params: dict[str, Weight]  # as config.parameter_shapes names them
    generation: dict[str, object] = field(default_factory=dict)  # recommended chat_format, system, temperature, top_p, or None
    path: Path | None = None
    manifest: Manifest = field(default_factory=dict)
    ops: Ops | None = None  # the operations for generation and perplexity; None: those that forward() chooses

    def __repr__(self) -> str:
        return f"<npllama.Model {self.path}: {n_parameters(self.config):,} parameters>"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer in the model directory, or None."""
        for name in TOKENIZER_FILES:
            if self.path is not None and name in self.manifest.get("files", {}):
                from ..tokenizer import load_tokenizer

                tokenizer = load_tokenizer(self.path / name)
                tokenizer.n_rows = self.config.vocab_size
                return tokenizer
        return None


def demo_path() -> Path:
    """Return the demo model's folder in the package; for a zip (zipapp), that of a copy that lasts as long as this process."""
    path = Path(__file__).resolve().parent.parent / "demo"
    return path if path.is_dir() else unpacked_demo()


@functools.cache
def unpacked_demo() -> Path:
    """Copy the demo model to a temporary folder: files inside a zip can't be mapped."""
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


def load(path: str | Path | None = None, dtype: str = "auto", processes: int = 1) -> Model:
    """Open a model directory, by its path or its name in the store, to compute with; without one, the embedded demo model.

    dtype "auto"     float32 if that fits in half of the free memory, else "stored"
          "stored"   weights stay as they are on disk, memory-mapped: linear() widens packed ones tile by tile
          "float32", "float64"   in memory, unless they are stored in that dtype and layout already (engine/layout.py)

    With several processes each computes its share of every product (engine/ranks/): this one and others that it starts, which
    end with it or with the model. All their threads together are at most as many as the processors: this process's number of
    threads is set accordingly, and stays so.

    Vectors (the norms' weights) are always widened. The decision and its reason go to the logger `npllama`. Raises
    CheckpointError or ConfigError, both ValueError.

    Mapped files must stay as they are while the model is in use: reading a part that another program has cut off ends the
    process with the signal SIGBUS, which Python can't catch. Replacing the whole directory, as convert --force does, is safe.
    """
    if dtype not in ("auto", "stored", "float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}, expected auto, stored, float32 or float64")
    if processes < 1:
        raise ValueError(f"the number of processes is {processes}, expected 1 or more")
    model = _open_share(demo_path() if path is None else path, 0, processes)
    dtype = _decided(dtype, model)
    if processes > 1:
        model.params = _spread(model, dtype, processes)
    else:
        model.params = _placed(model.params, model.config, dtype)
    return model


def fitting_processes(path: str | Path | None, dtype: str) -> tuple[int, str]:
    """Return how many processes suit a model on this machine, and why: one per core if its weights stay packed, else one.

    The threads of one process wait for Python's lock between the tiles of packed weights, but not in products of dense ones.
    """
    model = _open_share(demo_path() if path is None else path, 0, 1)
    if not any(map(is_packed, model.params.values())):
        return 1, "as the weights are not packed"
    if dtype != "stored" and (dtype != "auto" or _fits(model)[0]):
        return 1, "as the weights are widened, and threads compute dense ones"
    if os.name != "posix":
        return 1, "as this system can't start ranks"
    return min(threads.n_threads(), model.config.n_heads), "one per core, as the weights stay packed"


def _fits(model: Model) -> tuple[bool, int, int]:
    """Return whether the weights in float32 fit in half of the free memory, the bytes they need, and those free."""
    needed, free = layout.new_bytes(model.params, model.config, np.float32), available_memory()
    return needed <= free // 2, needed, free


def _decided(dtype: str, model: Model) -> str:
    """Return "float32" or "stored" for "auto", by the free memory."""
    if dtype != "auto":
        return dtype
    fits, needed, free = _fits(model)
    if any(map(is_packed, model.params.values())):
        sizes = size_text(needed), size_text(free)
        if fits:
            log.info("weights widened to float32, whose %s fit in half of the free %s", *sizes)
        else:
            log.warning("weights stay as stored: in float32 they take %s, more than half of the free %s", *sizes)
    return "float32" if fits else "stored"


def _placed(params: dict[str, Weight], config: Config, dtype: str) -> dict[str, Weight]:
    """Return the parameters as the model computes with them: mapped, or in memory."""
    if dtype != "stored":
        return layout.in_memory(params, config, dtype)
    params = {name: widen(weight) if weight.ndim == 1 else weight for name, weight in params.items()}
    read_ahead(params)
    return params


def _spread(model: Model, dtype: str, processes: int) -> Spread:
    """Start the other ranks, and return rank 0's part of the parameters."""
    from ..engine.ranks import shares
    from ..engine.ranks.leading import Leader
    from ..engine.ranks.local import Workers, threads_of_each
    from ..engine.ranks.passes import Spread

    shares.shares(model.config, processes)  # more ranks than there are heads are refused before anything is started
    threads.set_threads(threads_of_each(processes, threads.n_threads()))
    order = {"path": _shared_path(model), "dtype": dtype, "threads": threads.n_threads()}
    group = Workers(processes, order)
    try:
        leader = Leader(_part(model, dtype, group), group)
    except BaseException:
        group.close()
        raise
    group.wait_until_loaded()
    return Spread(leader.part.params, leader.forward, _whole(model), leader.check)


def load_over(path: str | Path | None, dtype: str, group: World) -> Model:
    """Open a model as load() does, as rank 0 of an MPI run whose other ranks follow: each with its own share."""
    from ..engine.ranks import shares
    from ..engine.ranks.leading import Leader
    from ..engine.ranks.passes import Spread

    model = _open_share(demo_path() if path is None else path, group.rank, group.size)
    shares.shares(model.config, group.size)
    dtype = _decided(dtype, model)
    told = threads.n_threads() if threads.n_threads() < threads.available_cpus() else None  # other machines may have more
    group.send({"path": _shared_path(model), "dtype": dtype, "threads": told})
    threads.set_threads(group.threads(told))
    try:
        leader = Leader(_part(model, dtype, group), group)
    except Exception as error:
        group.agree(error)
        raise
    group.agree(None)
    model.params = Spread(leader.part.params, leader.forward, _whole(model), leader.check)
    return model


def _whole(model: Model) -> Mapping[str, Weight] | None:
    """Return the mapped parameters of all ranks; None if the directory holds one rank's share only."""
    return None if "share" in model.manifest else model.params


def load_part(path: str | Path, dtype: str, group: Group) -> Part:
    """Open a model directory as one rank of a group: its share of the parameters, prepared as load() does."""
    return _part(_open_share(path, group.rank, group.size), dtype, group)


def _open_share(path: str | Path, rank: int, size: int) -> Model:
    """Open a model directory, or the rank's share that convert --ranks wrote. Raises CheckpointError for another rank's.

    A machine needs only its own ranks' folders.
    """
    folder = locate(path)
    if not (folder / "manifest.json").exists() and (others := sorted(folder.glob("rank-*-of-*"))):
        if not (own := folder / f"rank-{rank}-of-{size}").is_dir():
            raise CheckpointError(
                f"{folder} holds {others[0].name}, expected {own.name}: run as many processes as it was made for"
            )
        folder = own
    model = open_model(folder)
    if (share := model.manifest.get("share")) and (share["rank"], share["size"]) != (rank, size):
        raise CheckpointError(
            f"{folder} is the share of rank {share['rank']} of {share['size']}, expected rank {rank} of {size}"
        )
    return model


def _shared_path(model: Model) -> str:
    """Return the path from which every rank finds its share."""
    path = Path(model.path or ".").resolve()
    return str(path.parent if "share" in model.manifest else path)


def _part(model: Model, dtype: str, group: Group) -> Part:
    from ..engine.ranks import shares
    from ..engine.ranks.leading import Part

    share = shares.shares(model.config, group.size)[group.rank]
    parts = dict(model.params) if "share" in model.manifest else shares.cut(model.params, model.config, share)
    config = replace(shares.own_config(model.config, share), tied_embeddings=False)  # the output matrix is stored separately
    name = "tok_embeddings.weight"
    embedding = parts[name]
    if packed := dtype == "float32" and is_packed(embedding):  # its rows are widened as they are looked up: no rank copies it
        parts[name] = np.empty((0, config.dim), np.float32)
    placed = _placed(parts, config, dtype)
    if packed:
        placed[name] = embedding
    return Part(model.config, shares.joined(placed, model.config, group), group)


def read_ahead(params: Mapping[str, Weight]) -> None:
    """Advise the system (madvise) on the mapped weights, and log a warning if they don't fit into memory.

    Weights that fit are requested at once, in the order of their use, on another thread: computing then overlaps with reading
    from the disk. Weights that don't fit are read again for every token, and the system is advised not to keep them.
    """
    if not hasattr(mmap.mmap, "madvise"):  # Windows
        return
    maps = [m for weight in params.values() for m in _mappings(weight)]
    n_bytes, free = sum(map(len, maps)), free_memory()
    fits = n_bytes <= free
    advice = mmap.MADV_WILLNEED if fits else mmap.MADV_SEQUENTIAL

    def advise() -> None:
        for mapping in maps:
            with contextlib.suppress(OSError, ValueError):  # advice only; ValueError: the mapping was closed meanwhile
                mapping.madvise(advice)

    threading.Thread(target=advise, daemon=True, name="npllama-read-ahead").start()
    if not fits:
        sizes = size_text(n_bytes), size_text(free)
        log.warning("the weights take %s, but %s are free: each token reads them from the disk again", *sizes)


def _mappings(weight: Weight) -> Iterator[mmap.mmap]:
    arrays = weight.parts().values() if isinstance(weight, Grouped) else [weight.values if isinstance(weight, Form) else weight]
    for array in arrays:
        base: object = array
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        if (mapping := getattr(base, "_mmap", None)) is not None:
            yield mapping


def open_model(path: str | Path) -> Model:
    """Map every parameter exactly as it is stored; names, shapes, dtypes and sizes are checked, their content is not.

    If another run replaces the folder meanwhile, it is opened again: its files could belong to two models.
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
        raise no_directory(path)
    manifest = read_manifest(path)
    config, generation = read_config(path)
    tensors = manifest["tensors"]
    if config.n_layers > len(tensors):  # before parameter_shapes creates as many names as config.json says
        raise CheckpointError(
            f"{path / 'config.json'}: n_layers is {config.n_layers}, manifest.json lists {len(tensors)} tensors"
        )
    shapes = _shapes(path, config, manifest)
    check_names(path / "manifest.json", shapes, tensors)
    for name in manifest["files"]:
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
    arrays = array_files(tensors)
    if (n_bytes := sum(entry["bytes"] for entry in arrays.values())) > (limit := address_space()):
        why = "a 64-bit Python has no such limit" if sys.maxsize < 1 << 32 else "`ulimit -v` sets that limit"
        raise CheckpointError(
            f"{path}: the weights take {size_text(n_bytes)}, but this process can address {size_text(limit)}: {why}"
        )
    _allow_open_files(len(arrays))
    params = {name: _map_tensor(path, name, tensors[name], shape) for name, shape in shapes.items()}
    return Model(config, params, generation, path, manifest)


def _shapes(path: Path, config: Config, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the parameters must have; if the directory holds one rank's share, those of its parts."""
    if (found := manifest.get("share")) is None:
        return parameter_shapes(config)
    from ..engine.ranks.shares import part_shapes, shares

    rank, size = (found.get("rank"), found.get("size")) if isinstance(found, dict) else (None, None)
    if type(rank) is not int or type(size) is not int or not 0 <= rank < size:
        raise CheckpointError(f"{path / 'manifest.json'}: share is {shown(found)}, expected a rank below a size")
    return part_shapes(config, shares(config, size)[rank])


def _map_tensor(path: Path, name: str, entry: Manifest, shape: tuple[int, ...]) -> Weight:
    if tuple(entry["shape"]) != shape:
        raise CheckpointError(f"{path / 'manifest.json'}: {name} is {entry['shape']}, expected {list(shape)} by config.json")
    if entry["dtype"] == GROUPED:
        return _map_grouped(path, name, entry, shape)
    known = [dtype for dtype in STORAGE if dtype != "int8" or takes_int8(name)]
    if entry["dtype"] not in known:
        raise CheckpointError(f"{path / 'manifest.json'}: {name} has dtype {entry['dtype']!r}, expected {', '.join(known)}")
    array = map_array(path / entry["file"], entry["bytes"], STORAGE[entry["dtype"]], shape)
    if entry["dtype"] != "int8":
        return array
    scale = entry["scale"]
    return Int8(array, map_array(path / scale["file"], scale["bytes"], STORAGE["float32"], shape[:1]))


def _map_grouped(path: Path, name: str, entry: Manifest, shape: tuple[int, ...]) -> Grouped:
    grouping = Grouping.from_dict(entry["grouping"])
    try:
        parts = grouping.parts(shape)
    except ValueError as error:
        raise CheckpointError(f"{path / 'manifest.json'}: {name}: {error}") from None
    arrays = []
    for part, (part_shape, dtype) in parts.items():
        where = entry if part == "values" else entry[part]
        array = map_array(path / where["file"], where["bytes"], dtype, part_shape)
        arrays.append(np.moveaxis(array, 0, -1) if grouping.rows_first else array)
    return Grouped(grouping, *arrays)


def map_array(file: Path, n_bytes: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map a file of the model read-only. Raises CheckpointError where its size, dtype or shape is not the manifest's."""
    if (size := foreign.file_size(file, CheckpointError)) != n_bytes:
        raise CheckpointError(f"{file} is {size:,} bytes, expected {n_bytes:,}")
    array = foreign.read_npy(file, CheckpointError)
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran order"
        found = array.dtype.name if array.dtype == array.dtype.newbyteorder("<") else f"big-endian {array.dtype.name}"
        raise CheckpointError(f"{file} holds {found} {list(array.shape)}{order}, expected {dtype.name} {list(shape)}")
    return native(np.asarray(array))  # files are little-endian: on a big-endian machine this reads the file into memory


def _allow_open_files(n: int) -> None:
    """Raise the limit of open files as far as the system permits: each mapping keeps one open, and macOS starts with 256."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
