"""Read activations as a port writes them: a trace directory, .npz, .safetensors, a folder of .npy or of raw .f32."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ...checkpoint import foreign
from ...config import Config, ConfigError
from ...engine.weights import native, widen
from ...errors import NpllamaError, reason, shown
from ..precision import CONVENTIONS, PRECISIONS, ROUND, profile
from ..trace import Trace, read_trace
from .metrics import unit_roundoff

SHAPES_FILE = "shapes.json"
LONGEST_NAME = 200  # of an activation; those of forward() have at most 40 characters


class InputError(NpllamaError):
    """Raised for an input that can't be read as activations."""


class Activations(Mapping[str, np.ndarray]):
    """Name -> array, read at access.

    .path; .meta, the content of trace.json if there is one; .precision, in which the numbers were computed or stored;
    .mixed, the arrays stored in other precisions; .skipped, the names of integer arrays, which are no activations.
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
        self._readers = dict(readers)
        self._stored = stored
        self.skipped: list[str] = []

    def skip_whole_numbers(self) -> None:
        """Leave out integer arrays, such as token ids and positions, which a program may write with its activations."""
        if self.meta is None:
            self.skipped = [name for name, read in self._readers.items() if read().dtype.kind in "iub"]
            self._readers = {name: read for name, read in self._readers.items() if name not in self.skipped}

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
        """Count how many arrays are stored in each precision; none when trace.json says which they were computed in."""
        if self.meta:
            return Counter()
        types = {2: "float16", 4: "float32"}
        return Counter((self._stored or {}).get(name) or types.get(self[name].dtype.itemsize, "float64") for name in self)

    @property
    def precision(self) -> str:
        """Return the precision that trace.json states, else infer it from the types of the arrays.

        A 16-bit type if most arrays have it, else float32 if any has it, else float64. A few 16-bit arrays don't loosen the
        limit for all; a few float32 arrays do, since the float64 ones were computed from them.
        """
        if self.meta:
            return self.meta["precision"]
        narrow = [name for name in self._types if name in ROUND]
        if 2 * sum(self._types[name] for name in narrow) > len(self):
            return min(narrow, key=lambda name: (-self._types[name], unit_roundoff(name)))
        return max(self._types.keys() - ROUND.keys(), key=unit_roundoff)

    @property
    def mixed(self) -> str:
        """Describe the arrays of other precisions: "1 of 105 activations is stored as float16", or nothing."""
        others = {name: n for name, n in self._types.items() if name != self.precision}
        counts = [f"{n} {'is' if n == 1 else 'are'} stored as {name}" for name, n in others.items()]
        return f"of {len(self)} activations {' and '.join(counts)}" if counts else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape, from trace.json if there is one."""
        return tuple(self.meta["activations"][name]["shape"]) if self.meta else self[name].shape

    def made(self, name: str) -> bool:
        """Return whether the numbers were computed by the capture instead of the program itself."""
        return bool(self.meta and self.meta["activations"][name].get("made"))

    def hash_matches(self, name: str) -> bool:
        """Return whether a trace's file matches its sha256; true where there is no hash."""
        return self.trace is None or self.trace.hash_matches(name)


def read_activations(path: Path | str) -> Activations:
    """Open activations of any kind. Raises InputError, or TraceError for a broken trace, both ValueError, naming the file."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found, expected a trace directory, .npz, .safetensors, or a folder of .npy or .f32")
    if path.is_dir():
        activations = _read_folder(path)
    elif path.suffix == ".npz":
        activations = Activations(path, foreign.read_npz(path, InputError))
    elif path.suffix == ".safetensors":
        activations = _read_safetensors(path)
    else:
        raise InputError(f"{path}: expected a trace directory, .npz, .safetensors, or a folder of .npy or .f32")
    if not activations:
        raise InputError(f"{path}: empty, expected at least one activation")
    for name in activations:  # they go into tables of one line each
        if not name or not name.isprintable() or len(name) > LONGEST_NAME:
            raise InputError(f"{path}: an activation is named {shown(name)}, expected 1 to {LONGEST_NAME} printable characters")
    activations.skip_whole_numbers()
    if not activations:
        raise InputError(
            f"{path}: {activations.skipped[0]} and all other arrays hold whole numbers: expected floating-point numbers"
        )
    return activations


def _read_folder(path: Path) -> Activations:
    if (path / "trace.json").exists():
        trace = read_trace(path)
        _check_run(path / "trace.json", trace.meta)
        return Activations(path, {name: functools.partial(trace.__getitem__, name) for name in trace}, trace)
    try:
        npy, raw = sorted(path.rglob("*.npy")), sorted(path.rglob("*.f32"))
    except OSError as error:  # a folder below that may not be read
        raise InputError(f"{error.filename or path}: {reason(error)}") from None
    if npy and raw:
        raise InputError(f"{path}: holds both .npy and .f32 files, expected one kind")
    if npy:
        return Activations(path, {_name(file, path): functools.partial(foreign.read_npy, file, InputError) for file in npy})
    if not raw:
        return Activations(path, {})
    shapes = _read_shapes(path / SHAPES_FILE)
    names = {_name(file, path): file for file in raw}
    if without := sorted(set(names) ^ set(shapes)):
        where = "has no shape in" if without[0] in names else "has no .f32 file, but is in"
        raise InputError(f"{path}: {shown(without[0])} {where} {SHAPES_FILE}")
    read = foreign.read_raw
    return Activations(path, {n: functools.partial(read, file, shapes[n], InputError) for n, file in names.items()})


def _check_run(file: Path, meta: dict) -> None:
    """Raise InputError unless trace.json describes a valid run; read_trace() checks only the arrays' entries."""

    def refuse(key: str, expected: str) -> None:
        raise InputError(f"{file}: {key} is {shown(meta[key], 60)}, expected {expected}")

    if meta["precision"] not in PRECISIONS:
        refuse("precision", ", ".join(PRECISIONS))
    if meta["convention"] not in (None, *CONVENTIONS):
        refuse("convention", f"{', '.join(CONVENTIONS)} or null")
    if (given := meta.get("profile")) is not None:
        try:
            profile(given if isinstance(given, str) else shown(given))
        except ValueError as error:
            raise InputError(f"{file}: {error}") from None
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
    for name, entry in meta["activations"].items():
        if not _is_noise(entry.get("noise", {})):
            raise InputError(
                f"{file}: the noise of {shown(name)} is {shown(entry['noise'])}, expected rms and max by precision"
            )


def _is_noise(noise: object) -> bool:
    """Return whether this is a golden bundle's noise entry: {"float32": {"rms": number, "max": number}, ...}."""
    precisions = noise.values() if isinstance(noise, dict) else [None]
    numbers = [norms.get(norm) if isinstance(norms, dict) else None for norms in precisions for norm in ("rms", "max")]
    return all((type(x) is int or type(x) is float) and 0 <= x < math.inf for x in numbers)


def _are_ids(rows: list[list], least: int) -> bool:
    return all(ids and all(type(i) is int and least <= i < 2**31 for i in ids) for ids in rows)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()[: -len(file.suffix)]


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read {"layers.0.attention_norm": [5, 96], ...}."""
    if not file.exists():
        raise InputError(f"{file} is missing; raw .f32 files need it: {{name: shape}}")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in foreign.read_json(file, InputError, foreign.LONG_LIMIT).items():
        if not isinstance(shape, list) or not foreign.is_shape(shape):
            raise InputError(f"{file}: {shown(name)} has the shape {shown(shape)}, expected a list of whole numbers")
        shapes[name] = tuple(shape)
    return shapes


def _read_safetensors(path: Path) -> Activations:
    tensors = foreign.read_safetensors(path, InputError, foreign.LONG_LIMIT)
    stored = {name: "bfloat16" for name, x in tensors.items() if x.dtype == np.uint16}
    readers = {name: lambda x=x: widen(x) if x.dtype == np.uint16 else x for name, x in tensors.items()}
    return Activations(path, readers, stored=stored)
