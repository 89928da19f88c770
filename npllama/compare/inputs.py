"""Activations from whatever a port could write: a trace directory, .npz, .safetensors, a folder of .npy or of raw .f32."""

from __future__ import annotations

import functools
import json
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..config import Config, ConfigError
from ..errors import NpllamaError
from ..precision import CONVENTIONS, PRECISIONS, ROUND
from ..trace import Trace, read_trace
from ..weights import native, widen
from .metrics import unit_roundoff

SHAPES_FILE = "shapes.json"


class InputError(NpllamaError):
    """What was given can't be read as activations."""


class Activations(Mapping[str, np.ndarray]):
    """Name -> array, read when it is asked for.

    .path; .meta, the content of trace.json if there is one; .precision, which the numbers were computed or stored in;
    .mixed, what is stored otherwise.
    """

    def __init__(
        self,
        path: Path,
        readers: Mapping[str, Callable[[], np.ndarray]],
        trace: Trace | None = None,
        stored: Mapping[str, str] | None = None,
    ):
        self.path = path
        self.trace = trace
        self.meta: dict | None = trace.meta if trace else None
        self._readers = readers
        self._stored = stored

    def __getitem__(self, name: str) -> np.ndarray:
        x = native(self._readers[name]())
        if x.dtype.kind != "f":
            raise InputError(f"{self.path}: {name} holds {x.dtype}, expected floating-point numbers (bfloat16: as float32)")
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    @functools.cached_property
    def _types(self) -> Counter[str]:
        """How many arrays are stored in each precision; none when trace.json says which they were computed in."""
        if self.meta:
            return Counter()
        types = {2: "float16", 4: "float32"}
        return Counter((self._stored or {}).get(name) or types.get(self[name].dtype.itemsize, "float64") for name in self)

    @property
    def precision(self) -> str:
        """As trace.json says; else a 16-bit type if most arrays are stored in one, else float32 if any is, else float64.

        Few arrays of 16 bits don't loosen the judgement of all; few of float32 do, as what is float64 was computed from them.
        """
        if self.meta:
            return self.meta["precision"]
        narrow = [name for name in self._types if name in ROUND]
        if 2 * sum(self._types[name] for name in narrow) > len(self):
            return min(narrow, key=lambda name: (-self._types[name], unit_roundoff(name)))
        return max(self._types.keys() - ROUND.keys(), key=unit_roundoff)

    @property
    def mixed(self) -> str:
        """What else is stored, for people: "1 of 105 activations is stored as float16", or nothing."""
        others = {name: n for name, n in self._types.items() if name != self.precision}
        counts = [f"{n} {'is' if n == 1 else 'are'} stored as {name}" for name, n in others.items()]
        return f"of {len(self)} activations {' and '.join(counts)}" if counts else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """An array's shape, from trace.json if there is one."""
        return tuple(self.meta["activations"][name]["shape"]) if self.meta else self[name].shape

    def hash_matches(self, name: str) -> bool:
        """Whether a trace's file is the one that was written; true where there is no hash."""
        return self.trace is None or self.trace.hash_matches(name)


def read_activations(path: Path | str) -> Activations:
    """Open activations of any kind. Raises InputError, or TraceError for a broken trace, both ValueError, naming the file."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found, expected a trace directory, .npz, .safetensors, or a folder of .npy or .f32")
    if path.is_dir():
        activations = _read_folder(path)
    elif path.suffix == ".npz":
        activations = _read_npz(path)
    elif path.suffix == ".safetensors":
        activations = _read_safetensors(path)
    else:
        raise InputError(f"{path}: expected a trace directory, .npz, .safetensors, or a folder of .npy or .f32")
    if not activations:
        raise InputError(f"{path}: empty, expected at least one activation")
    return activations


def _read_folder(path: Path) -> Activations:
    if (path / "trace.json").exists():
        trace = read_trace(path)
        _check_run(path / "trace.json", trace.meta)
        return Activations(path, {name: lambda n=name: trace[n] for name in trace}, trace)
    npy, raw = sorted(path.rglob("*.npy")), sorted(path.rglob("*.f32"))
    if npy and raw:
        raise InputError(f"{path}: holds both .npy and .f32 files, expected one kind")
    if npy:
        return Activations(path, {_name(file, path): lambda f=file: _load_npy(f) for file in npy})
    if not raw:
        return Activations(path, {})
    shapes = _read_shapes(path / SHAPES_FILE)
    names = {_name(file, path): file for file in raw}
    if without := sorted(set(names) ^ set(shapes)):
        where = "has no shape in" if without[0] in names else "has no .f32 file, but is in"
        raise InputError(f"{path}: {without[0]} {where} {SHAPES_FILE}")
    return Activations(path, {n: lambda f=file, s=shapes[n]: _load_f32(f, s) for n, file in names.items()})


def _check_run(file: Path, meta: dict) -> None:
    """Raise InputError unless what trace.json says of the run can be used: read_trace() looks only at the arrays' entries."""

    def refuse(key: str, expected: str) -> None:
        found = json.dumps(meta[key])
        raise InputError(f"{file}: {key} is {found if len(found) <= 60 else found[:57] + '...'}, expected {expected}")

    if meta["precision"] not in PRECISIONS:
        refuse("precision", ", ".join(PRECISIONS))
    if meta["convention"] not in (None, *CONVENTIONS):
        refuse("convention", f"{', '.join(CONVENTIONS)} or null")
    rows = meta["tokens"] if isinstance(meta["tokens"], list) else []
    batch = [row if isinstance(row, list) else [row] for row in rows]
    if not rows or len({(type(row), len(ids)) for row, ids in zip(rows, batch, strict=True)}) > 1 or not _are_ids(batch, -1):
        refuse("tokens", "a list of token ids, or one for each sequence, all as long")
    n = len(rows) if isinstance(rows[0], list) else 1
    steps = meta["steps"]
    if (
        not isinstance(steps, list)
        or any(not isinstance(ids, list) or len(ids) != n for ids in steps)
        or not _are_ids(steps, 0)
    ):
        refuse("steps", f"a list with {n} token id{'s' * (n > 1)} for each step")
    model = meta["model"]
    texts = isinstance(model, dict) and all(isinstance(model.get(k), str | None) for k in ("path", "manifest_sha256"))
    if not texts:
        refuse("model", "its path and manifest_sha256, each text or null, and its config")
    if (config := model.get("config")) is not None:
        try:
            Config.from_dict(config)
        except ConfigError as error:
            raise InputError(f"{file}: the model's config: {error}") from None


def _are_ids(rows: list[list], least: int) -> bool:
    return all(ids and all(type(i) is int and least <= i < 2**31 for i in ids) for ids in rows)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()[: -len(file.suffix)]


def _load_npy(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: {str(error) or 'empty file'}") from None


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """{"layers.0.attention_norm": [5, 96], ...}"""
    try:
        shapes = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; raw .f32 files need it: {{name: shape}}") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    if not isinstance(shapes, dict):
        raise InputError(f"{file}: found {type(shapes).__name__}, expected {{name: shape}}")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise InputError(f"{file}: {name} has the shape {shape!r}, expected a list of whole numbers")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _load_f32(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    expected = 4 * math.prod(shape)
    if (found := file.stat().st_size) != expected:
        raise InputError(f"{file}: {found} bytes, expected {expected} for shape {list(shape)} in float32")
    return np.fromfile(file, "<f4").reshape(shape)


def _read_npz(path: Path) -> Activations:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a whole .npz, which is a zip file")
    archive = np.load(path, allow_pickle=False)

    def read(name: str) -> np.ndarray:
        try:
            return archive[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: {name}: {error}") from None

    return Activations(path, {name: lambda n=name: read(n) for name in archive.files})


def _read_safetensors(path: Path) -> Activations:
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise InputError(f"{path}: reading it needs the package safetensors, which is not installed") from None
    try:
        tensors = dict(deserialize(path.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {error}") from None
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    for name, tensor in tensors.items():
        if tensor["dtype"] not in dtypes:
            raise InputError(f"{path}: {name} holds {tensor['dtype']}, expected floating-point numbers")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        x = np.frombuffer(tensor["data"], dtypes[tensor["dtype"]]).reshape(tensor["shape"])
        return widen(x) if tensor["dtype"] == "BF16" else x

    stored = {name: "bfloat16" for name, tensor in tensors.items() if tensor["dtype"] == "BF16"}
    return Activations(path, {name: lambda n=name: read(n) for name in tensors}, stored=stored)
