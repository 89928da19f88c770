"""Write a model directory, whole or not at all: tensor by tensor in blocks of rows, which are rounded, checked and hashed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..config import Config, parameter_shapes
from ..engine.grouped import INT4, INT4_LIMIT, Grouped, Grouping, to_int4
from ..engine.memory import size_text
from ..engine.weights import Int8, native, to_bfloat16, to_int8, widen
from .atomic import check_target, new_folder, not_ours, writing
from .format import (
    FORMAT_VERSION,
    GROUPED,
    STORAGE,
    CheckpointError,
    Manifest,
    Storage,
    array_files,
    check_generation,
    check_names,
    is_plain_name,
    read_manifest,
    stored_bytes,
    takes_int8,
)

if TYPE_CHECKING:
    from ..engine.ranks.shares import Share

BLOCK_BYTES = 1 << 18  # what is converted, checked, hashed and written at once: small enough for a core's cache
WRITE_BYTES = 1 << 16  # at once: the page cache makes folios as large as a write is, and large ones can take it long to find
BLOCKS_AHEAD = 4  # how many blocks the hashing may be behind the writing
# The explanation in manifest.json of tensors quantised in groups, for readers with other tools.
READING = (
    "weight[row, g * group + k] = scale[0, g, row] * (q - zero) + scale[1, g, row], the last term if offset is true. "
    "bits 8: q = values[g, k, row]. bits 4: q = values[g, k, row] & 15 for k < group / 2, "
    "q = values[g, k - group / 2, row] >> 4 for the others. unit > 0: multiply scale[i, g, row] by unit[i, g // unit, row]. "
    "rows_first: the row is the first index of each array, not the last. scale bfloat16: the upper 16 bits of a float32."
)
# The second largest float32: the scale of the largest may round to more than a 127th of it, and the product to infinity.
INT8_LIMIT = np.nextafter(np.finfo(np.float32).max, np.float32(0))


def check_free(path: str | Path, force: bool = False) -> None:
    """Raise the ValueError that create() would for an existing path, before anything costly begins."""
    check_target(Path(os.path.realpath(path)), force, _why_not_ours)


@contextlib.contextmanager
def create(
    path: str | Path,
    config: Config,
    dtype: Storage | Mapping[str, Storage],
    source: Mapping[str, object],
    force: bool = False,
    generation: Mapping[str, object] | None = None,
    share: Share | None = None,
) -> Iterator[Writer]:
    """Write a model directory that appears at `path` complete, or not at all.

        with create("model", config, "bfloat16", source={"kind": "test"}) as writer:
            for name, array in weights.items():
                writer.add(name, array)
            writer.add_file("tokenizer.model", Path("tokenizer.model"))

    dtype       float32, float16 or bfloat16; or one for each parameter's name, which may be int8 where takes_int8(name), or a
                Grouping for a matrix
    source      stored in the manifest; it may be filled in until the block ends
    force       replace a model directory, or an empty folder; nothing else
    generation  recommended settings: chat_format, system (the prompt), temperature, top_p
    share       the rank whose parts alone are written (shares.part_shapes)

    Raises CheckpointError, or another ValueError: before the first byte is written if the disk is too full for the parameters.
    """
    path = Path(path)
    shapes = parameter_shapes(config)
    if share is not None:
        from ..engine.ranks.shares import part_shapes

        shapes = part_shapes(config, share)
    dtypes = {name: dtype[name] if isinstance(dtype, Mapping) else dtype for name in shapes}
    if unknown := {kind for kind in dtypes.values() if isinstance(kind, str)}.difference(STORAGE):
        raise CheckpointError(f"dtype is {min(unknown)!r}, expected {', '.join(STORAGE)}")
    for name, kind in dtypes.items():
        _check_grouping(name, kind, shapes[name])
    if refused := [name for name in shapes if dtypes[name] == "int8" and not takes_int8(name)]:
        raise CheckpointError(f"{refused[0]} is not quantized: its dtype is int8, expected float32, float16, bfloat16")
    generation = check_generation(generation or {})
    headers = 128 * sum(1 if kind in ("float32", "float16", "bfloat16") else 3 for kind in dtypes.values())
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
                writer._finish(config, source, generation, share)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{path}: the disk is full; the model needs {size_text(needed)}. Nothing was left behind"
        ) from None


class Writer:
    """The parameters of a model that is being written, in any order, whole or block by block; create() makes it."""

    progress: Callable[[int], object] | None = None  # set it to be called with the bytes just written

    def __init__(
        self,
        folder: Path,
        target: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, Storage],
        hashing: Executor,
    ):
        self._folder, self._target = folder, target  # the folder it is written in, and its final name
        self._shapes, self._dtypes, self._hashing = shapes, dtypes, hashing
        self._tensors: dict[str, Manifest] = {}
        self._files: dict[str, Manifest] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Write a parameter given whole: float16, float32, float64, or uint16 holding the bits of bfloat16."""
        array = np.asarray(array)
        step = max(1, BLOCK_BYTES * len(array) // max(1, array.nbytes)) if array.ndim else 1
        if array.shape != (shape := self._shape_of(name)):
            raise CheckpointError(f"{name} is {list(array.shape)}, expected {list(shape)}")
        self.add_blocks(name, (array[start : start + step] for start in range(0, len(array), step)))

    def add_blocks(self, name: str, blocks: Iterable[np.ndarray] | Iterable[Grouped]) -> None:
        """Write a parameter given as consecutive blocks of rows, so that it is never in memory as a whole.

        Values are rounded to nearest even where the storage is narrower. Where it is a Grouping, the blocks are Grouped rows
        of the same grouping, and the matrix is collected as it is stored; for INT4 they may be numbers, which are quantised.
        Raises CheckpointError, naming the tensor, for a wrong name or shape, a value that is not finite, and one that would
        overflow to infinity.
        """
        shape, dtype, n_rows = self._shape_of(name), self._dtypes[name], 0
        if isinstance(dtype, Grouping):
            self._add_grouped(name, blocks, dtype, shape)
            return
        scales: list[np.ndarray] = []
        with self._new(f"{name}.npy") as file:
            stream = _NpyStream(file, shape, STORAGE[dtype], self._hashing)
            for block in blocks:
                _check_rows(name, block.shape, n_rows, shape)
                if isinstance(block, Grouped):
                    raise CheckpointError(f"{name} is quantised in groups, expected numbers to store as {dtype}")
                data = to_storage(block, dtype, name, n_rows)
                n_rows += len(block)
                if isinstance(data, Int8):
                    scales.append(data.scale)
                stream.write(data.values if isinstance(data, Int8) else data)
                if self.progress:
                    self.progress(data.nbytes)
        if n_rows != shape[0]:
            raise CheckpointError(f"{name} has {n_rows} rows, expected {shape[0]}")
        entry: Manifest = {
            "file": f"{name}.npy",
            "dtype": dtype,
            "shape": list(shape),
            "bytes": stream.n_bytes,
            "sha256": stream.sha256,
        }
        if scales:
            with self._new(f"{name}.scale.npy") as file:
                stream = _NpyStream(file, shape[:1], STORAGE["float32"], self._hashing)
                stream.write(np.concatenate(scales))
            entry["scale"] = {"file": f"{name}.scale.npy", "bytes": stream.n_bytes, "sha256": stream.sha256}
        self._tensors[name] = entry

    def _add_grouped(
        self, name: str, blocks: Iterable[np.ndarray] | Iterable[Grouped], grouping: Grouping, shape: tuple[int, ...]
    ) -> None:
        """Collect all rows of a quantised matrix, which are on its arrays' last axis, and write the arrays."""
        arrays = {part: np.empty(*form) for part, form in grouping.parts(shape).items()}
        by_row = {part: np.moveaxis(x, 0, -1) if grouping.rows_first else x for part, x in arrays.items()}
        n_rows = 0
        for block in blocks:
            _check_rows(name, block.shape, n_rows, shape)
            rows = block if isinstance(block, Grouped) else _to_int4(block, grouping, name, n_rows)
            if replace(rows.grouping, rows_first=grouping.rows_first) != grouping:
                raise CheckpointError(f"{name} is quantised as {rows.grouping}, expected {grouping}")
            _check_scales(rows, name, n_rows)
            for part, array in rows.parts().items():
                by_row[part][..., n_rows : n_rows + rows.shape[0]] = array
            n_rows += rows.shape[0]
        if n_rows != shape[0]:
            raise CheckpointError(f"{name} has {n_rows} rows, expected {shape[0]}")
        entry: Manifest = {"dtype": GROUPED, "shape": list(shape), "grouping": asdict(grouping)}
        for part, array in arrays.items():
            file_name = f"{name}.npy" if part == "values" else f"{name}.{part}.npy"
            with self._new(file_name) as file:
                stream = _NpyStream(file, array.shape, array.dtype, self._hashing)
                flat = array.reshape(-1)
                for start in range(0, flat.size, BLOCK_BYTES):
                    stream.write(flat[start : start + BLOCK_BYTES])
                    if self.progress:
                        self.progress(flat[start : start + BLOCK_BYTES].nbytes)
            written = {"file": file_name, "bytes": stream.n_bytes, "sha256": stream.sha256}
            entry |= written if part == "values" else {part: written}
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

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter that is still to be written."""
        if name not in self._shapes:
            raise CheckpointError(f"{name} is not a parameter of this model")
        if name in self._tensors:
            raise CheckpointError(f"{name} is there twice")
        return self._shapes[name]

    def _finish(self, config: Config, source: Mapping[str, object], generation: dict[str, object], share: Share | None) -> None:
        check_names("the model", self._shapes, self._tensors)
        self.add_file("config.json", _json({**config.to_dict(), "generation": generation}))
        weights = [t for name, t in self._tensors.items() if takes_int8(name)]  # the matrices, without the embedding
        in_bytes = {dtype: sum(t["bytes"] for t in weights if t["dtype"] == dtype) for dtype in (*STORAGE, GROUPED)}
        grouped = any(t["dtype"] == GROUPED for t in self._tensors.values())
        manifest = {
            "npllama_format": FORMAT_VERSION if grouped else 1,  # an older npllama reads a model without grouped tensors too
            "source": source,
            "dtype": max(in_bytes, key=lambda dtype: in_bytes[dtype]),
            "tensors": {name: self._tensors[name] for name in self._shapes},
            "files": self._files,
        }
        if share is not None:
            manifest["share"] = {"rank": share.rank, "size": share.size}
        if grouped:
            manifest["reading"] = {GROUPED: READING}
        with self._new("manifest.json") as file:
            file.write(_json(manifest))


class _NpyStream:
    """An .npy file that is written block by block, and hashed on another thread meanwhile."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, hashing: Executor):
        self._file, self._dtype, self._hashing, self._digest, self.n_bytes = file, dtype, hashing, hashlib.sha256(), 0
        self._behind: deque[Future[None]] = deque()
        self._put(_npy_header(shape, dtype))

    def write(self, block: np.ndarray) -> None:
        """Add the next rows, in the byte order of the header. The caller must not change them afterwards."""
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


def to_storage(block: np.ndarray, dtype: str, name: str, first_row: int) -> np.ndarray | Int8:
    """Return a block in its storage dtype, in this machine's byte order, contiguous and checked to be finite."""
    block, storage = _finite(block, name, first_row), STORAGE[dtype].newbyteorder("=")
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


def _check_grouping(name: str, kind: Storage, shape: tuple[int, ...]) -> None:
    if isinstance(kind, Grouping):
        try:
            kind.check(shape)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None


def _check_rows(name: str, found: tuple[int, ...], n_before: int, shape: tuple[int, ...]) -> None:
    if found[1:] != shape[1:] or n_before + found[0] > shape[0]:
        raise CheckpointError(f"{name}: rows {list(found)} after {n_before} others, expected {list(shape)} in all")


def _to_int4(block: np.ndarray, grouping: Grouping, name: str, first_row: int) -> Grouped:
    """Quantise a block of numbers, after checking that they are finite and within the range of float16 scales."""
    if replace(grouping, rows_first=False) != INT4:
        raise CheckpointError(f"{name} is given as numbers, expected rows quantised as {grouping}")
    wide = widen(_finite(block, name, first_row))
    _refuse(np.abs(wide) > INT4_LIMIT, wide, name, first_row, "too large for int4")
    return to_int4(wide)


def _check_scales(rows: Grouped, name: str, first_row: int) -> None:
    """Raise CheckpointError for a group with a number that is not finite."""
    floats = rows.scale if rows.unit is None else rows.unit
    if len(bad := np.argwhere(_not_finite(native(floats)))):
        raise CheckpointError(f"{name}: a scale of row {first_row + bad[0][-1]} is not finite")
    with np.errstate(over="ignore"):
        levels = np.abs(rows.all_levels())
        most = levels[0] * np.float32(rows.grouping.most) + (levels[1] if rows.grouping.offset else np.float32(0))
    if len(bad := np.argwhere(~np.isfinite(most))):
        raise CheckpointError(f"{name}: a scale of row {first_row + bad[0][-1]} is too large for float32")


def _finite(block: np.ndarray, name: str, first_row: int) -> np.ndarray:
    """Return a block in this machine's byte order, after checking that its dtype is known and its numbers finite."""
    block = native(block)
    if block.dtype not in (np.uint16, np.float16, np.float32, np.float64):
        raise CheckpointError(f"{name} is {block.dtype}, expected float16, float32, float64, or uint16 for bfloat16")
    _refuse(_not_finite(block), block, name, first_row, "which is not finite")
    return block


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
    """Return the reason not to replace a folder: it is no model directory, or holds other files. Else None."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    listed = {"manifest.json", *manifest["files"], *array_files(manifest["tensors"])}
    return not_ours(path, listed)
