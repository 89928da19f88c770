"""Read files that other programs wrote, without trusting them: JSON, .npy, .npz, .safetensors and raw float32.

Each reader raises the kind of ValueError that its caller passes, in one printable line that names the file, for anything
but a regular file of its form. None takes more memory than the file's size justifies: a header's sizes are compared with the
file's bytes before anything is allocated, and JSON is read up to a limit.
"""

from __future__ import annotations

import errno
import functools
import io
import itertools
import json
import math
import os
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Literal, TypeGuard

import numpy as np

from ..engine.memory import size_text
from ..errors import printable, reason, shown

JSON_LIMIT = 4 << 20  # bytes, for what describes a model; the manifest of a 405B model has 0.4 million
LONG_LIMIT = 64 << 20  # for a vocabulary, or an entry for every activation; the largest published tokenizer.json has 34 million
JSON_DEPTH = 100  # levels; a description of a model has ten
MOST_DIGITS = 100  # of a whole number in JSON; the longest in a published file has 31 (tokenizer_config.json)
NPY_HEADER_LIMIT = 10_000  # bytes, np.load's limit
MOST_AXES = 32  # of an array, NumPy 1.26's limit
# An .npz may expand to this size in any case, else to this multiple of its own size. Activations compress to a tenth.
NPZ_ALWAYS, NPZ_RATIO = 64 << 20, 100
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}

Error = type[ValueError]
Order = Literal["C", "F"]


# ----------------------------------------------------------------------------------------------------------------- whole files


def file_size(path: Path, error: Error) -> int:
    """Return the size of a regular file: opening a FIFO would wait for ever, and a device may have no end."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise error(f"{printable(str(path))} is missing") from None
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        raise error(f"{printable(str(path))}: {reason(cause)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a FIFO, a socket or a device"
        raise error(f"{printable(str(path))} is {kind}, expected a file")
    return found.st_size


def read_bytes(path: Path, limit: int, error: Error) -> bytes:
    """Read a regular file of at most `limit` bytes."""
    size = file_size(path, error)
    try:
        with open(path, "rb") as file:
            data = file.read(min(size, limit) + 1)
            if len(data) > size:  # it grew, or is a file such as those in /proc, whose size is 0
                data += file.read(limit + 1 - len(data))
    except OSError as cause:
        raise error(f"{printable(str(path))}: {reason(cause)}") from None
    if len(data) > limit:
        raise error(f"{printable(str(path))} is {max(size, len(data)):,} bytes, expected at most {limit:,}")
    return data


# ------------------------------------------------------------------------------------------------------------------------ JSON


def parse_json(data: bytes) -> dict[str, object]:
    """Parse a JSON object. Raises ValueError unless it is JSON, TypeError with the type's name for another value.

    NaN, Infinity and numbers beyond a float's range are read as floats, as Python writes them: a field that takes numbers
    refuses them with its name. A key that is there twice is refused unless both values are equal.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_int=_whole, object_pairs_hook=_unambiguous)
    except RecursionError:
        value, depth = None, JSON_DEPTH + 1
    else:
        depth, level = 0, [value]
        while level and depth <= JSON_DEPTH:
            depth += 1
            level = [part for x in level for part in _parts(x) if isinstance(part, dict | list)]
    if depth > JSON_DEPTH:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels")
    if not isinstance(value, dict):
        raise TypeError(type(value).__name__)
    return value


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def _parts(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        first: dict[str, object] = {}
        for key, value in pairs:
            if first.setdefault(key, value) is not value and first[key] != value:
                raise ValueError(f"{shown(key)} is there twice, with different values")
    return values


def read_json(path: Path, error: Error, limit: int = JSON_LIMIT) -> dict[str, object]:
    """Read the JSON object in a file."""
    data = read_bytes(path, limit, error)
    try:
        return parse_json(data)
    except TypeError as cause:
        raise error(f"{printable(str(path))} holds {cause}, expected a JSON object") from None
    except ValueError as cause:
        raise error(f"{printable(str(path))} is not JSON: {reason(cause)}") from None


def is_shape(value: object, least: int = 0) -> TypeGuard[list[int]]:
    """Return whether a JSON value is an array's shape, none of its sizes below `least`."""
    return isinstance(value, list) and len(value) <= MOST_AXES and all(type(n) is int and least <= n < 1 << 63 for n in value)


# --------------------------------------------------------------------------------------------------------------- NumPy's files


def read_npy(path: Path, error: Error) -> np.ndarray:
    """Map the array of an .npy file."""
    size = file_size(path, error)
    try:
        with open(path, "rb") as file:
            shape, order, dtype, offset = _npy_header(file)
        _check_bytes(shape, dtype, size - offset)
        return _map(path, shape, dtype, offset, order)
    except OSError as cause:
        raise error(f"{printable(str(path))}: {reason(cause)}") from None
    except Exception as cause:  # a broken header surfaces as ValueError, SyntaxError, TokenError, MemoryError ...
        raise error(f"{printable(str(path))} is not a NumPy array file: {reason(cause)}") from None


def read_raw(path: Path, shape: tuple[int, ...], error: Error) -> np.ndarray:
    """Map the bare little-endian float32 numbers of a file, as many as the shape has."""
    expected = 4 * math.prod(shape)
    if (found := file_size(path, error)) != expected:
        raise error(f"{printable(str(path))}: {found} bytes, expected {expected} for shape {list(shape)} in float32")
    try:
        return _map(path, shape, np.dtype("<f4"), 0, "C")
    except (OSError, ValueError) as cause:  # ValueError: a size of 0, and another that no array can have
        raise error(f"{printable(str(path))}: {reason(cause)}") from None


def read_npz(path: Path, error: Error) -> dict[str, Callable[[], np.ndarray]]:
    """Open an .npz file: name -> a function that reads the array."""
    where, size = printable(str(path)), file_size(path, error)
    try:
        archive = zipfile.ZipFile(path)
    except Exception as cause:  # zipfile raises many types on broken archives
        raise error(f"{where}: not a whole .npz, which is a zip file: {reason(cause)}") from None
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            raise error(f"{where}: {shown(name)} is no array, expected .npy members alone")
        if name in members:
            raise error(f"{where}: {shown(name)} is there twice")
        if info.flag_bits & 1:
            raise error(f"{where}: {shown(name)} is encrypted, which np.load can't read")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise error(f"{where}: {shown(name)} is compressed by method {info.compress_type}, expected as np.savez writes it")
        members[name] = info
    expanded = sum(info.file_size for info in members.values())
    if expanded > max(NPZ_ALWAYS, NPZ_RATIO * size):
        raise error(
            f"{where}: its {size:,} bytes expand to {expanded:,}, more than {NPZ_RATIO} times; np.savez compresses nothing"
        )

    def read(name: str) -> np.ndarray:
        try:
            with archive.open(members[name]) as file:
                shape, order, dtype, offset = _npy_header(file)
                n_bytes = _check_bytes(shape, dtype, members[name].file_size - offset)
                data = bytearray(n_bytes)
                if file.readinto(data) != n_bytes:  # type: ignore[attr-defined]  # zipfile's own class has it
                    raise ValueError("cut off")
                file.read()  # to its end, where the checksum is compared
                return np.frombuffer(data, dtype, math.prod(shape)).reshape(shape, order=order)
        except Exception as cause:  # those of both formats
            raise error(f"{where}: {shown(name)} is not a NumPy array: {reason(cause)}") from None

    return {name: functools.partial(read, name) for name in members}


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], Order, np.dtype, int]:
    """Return the shape, the order, the dtype, and the offset of the numbers."""
    start = file.read(12)
    if start[:4] == b"PK\x03\x04":
        raise ValueError("it is a zip file, expected .npy (an .npz needs that ending)")
    if len(start) < 12 or start[:6] != b"\x93NUMPY":
        raise ValueError(f"it begins with {start[:6]!r}" if start else "it is empty")
    if start[6:8] not in (b"\1\0", b"\2\0"):
        raise ValueError(f"its version is {start[6]}.{start[7]}, expected 1.0 or 2.0")
    code, read = ("<H", np.lib.format.read_array_header_1_0) if start[6] == 1 else ("<I", np.lib.format.read_array_header_2_0)
    offset = 8 + struct.calcsize(code) + struct.unpack_from(code, start, 8)[0]
    if not 12 <= offset <= NPY_HEADER_LIMIT:
        raise ValueError(f"its header takes {offset:,} bytes, expected at most {NPY_HEADER_LIMIT:,}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser; the parsed header is checked below
        shape, fortran, dtype = read(io.BytesIO(start[8:] + file.read(offset - 12)))
    if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise ValueError(f"its shape is {shown(shape)}")
    if dtype.hasobject or dtype.subdtype or dtype.names or not dtype.itemsize:
        raise ValueError(f"it holds {shown(str(dtype))}, expected numbers")
    return shape, "F" if fortran else "C", dtype, offset


def _check_bytes(shape: tuple[int, ...], dtype: np.dtype, found: int) -> int:
    """Return how many bytes an array takes; ValueError if there are fewer."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > found:
        raise ValueError(f"{dtype} {list(shape)} takes {n_bytes:,} bytes, but {found:,} are there: cut off?")
    return n_bytes


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int, order: Order) -> np.ndarray:
    if not math.prod(shape):  # which mmap can't do
        return np.zeros(shape, dtype)
    try:
        return np.memmap(path, dtype, "r", offset, shape, order)
    except OSError as cause:
        if cause.errno != errno.ENOMEM:
            raise
        n_bytes = math.prod(shape) * dtype.itemsize
        raise OSError(cause.errno, f"{cause.strerror}: {size_text(n_bytes)} of address space are needed") from None


# ----------------------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(
    path: Path, error: Error, header_limit: int = JSON_LIMIT, dtypes: Mapping[str, np.dtype] = SAFETENSORS_DTYPES
) -> dict[str, np.ndarray]:
    """Map every tensor of a .safetensors file: name -> array; bfloat16 as its bits in uint16. Only those in `dtypes` are read.

    The format: eight bytes of length, a JSON header, then the numbers, where no two tensors may overlap (its own README).
    """
    where, size = printable(str(path)), file_size(path, error)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(header_limit, size - 8):
                raise error(f"{where} is not a safetensors file: a header of {length:,} bytes in a file of {size:,}")
            text = file.read(length)
        data = _map(path, (size - 8 - length,), np.dtype(np.uint8), 8 + length, "C")
    except OSError as cause:
        raise error(f"{where}: {reason(cause)}") from None
    try:
        header = parse_json(text)
    except (TypeError, ValueError):
        raise error(f"{where} is not a safetensors file: its header is not a JSON object") from None
    header.pop("__metadata__", None)
    data, tensors, places = np.asarray(data), {}, []
    for name, entry in header.items():
        tensors[name], begin, end = _tensor(f"{where}: {printable(name[:80])}", entry, data, error, dtypes)
        if end > begin:
            places.append((begin, end, name))
    places.sort()
    for (_, end, one), (begin, _, other) in itertools.pairwise(places):
        if begin < end:
            raise error(f"{where}: {shown(one)} and {shown(other)} overlap, expected bytes of its own for each tensor")
    return tensors


def _tensor(
    where: str, entry: object, data: np.ndarray, error: Error, dtypes: Mapping[str, np.dtype]
) -> tuple[np.ndarray, int, int]:
    """Return a tensor of the file's data, and where it begins and ends."""
    stated: Mapping[str, object] = entry if isinstance(entry, Mapping) else {}
    shape, offsets, kind = stated.get("shape"), stated.get("data_offsets"), stated.get("dtype")
    if not is_shape(shape) or not is_shape(offsets):
        raise error(f"{where} has shape {shown(shape)} at {shown(offsets)}, expected whole numbers")
    if (dtype := dtypes.get(kind if isinstance(kind, str) else "")) is None:
        raise error(f"{where} is {shown(kind)}, expected {', '.join(dtypes)}")
    if len(offsets) != 2 or not offsets[1] <= len(data) or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise error(f"{where} {shape} {kind} is said to be at {offsets} of {len(data):,} bytes")
    try:
        return data[offsets[0] : offsets[1]].view(dtype).reshape(shape), offsets[0], offsets[1]
    except ValueError as cause:  # a size of 0, and another that no array can have
        raise error(f"{where} has shape {shown(shape)}: {reason(cause)}") from None
