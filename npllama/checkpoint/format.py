"""Define a model directory: its names, how numbers are stored, what manifest.json and config.json hold, and their checks.

One .npy file per parameter, config.json, manifest.json and the tokenizer. NumPy has no bfloat16: here an array of
dtype uint16, on disk as in memory, holds the upper 16 bits of float32 numbers. An int8 array has the float32 scales of its rows
in a .scale.npy next to it. A matrix quantised in groups has the dtype "grouped", the Grouping in its entry, and further arrays
next to it, as engine/grouped.py lists them.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ..config import Config, ConfigError
from ..engine.grouped import Grouping
from ..errors import NpllamaError, shown
from . import foreign
from .store import NAME

Manifest = dict[str, Any]  # JSON, in the form that read_manifest checks

FORMAT_VERSION = 2  # 1: nothing is grouped
GROUPED = "grouped"  # a tensor's dtype in the manifest
STORAGE: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}
MANIFEST_SECTIONS: dict[str, dict[str, type]] = {
    "tensors": {"file": str, "dtype": str, "shape": list, "bytes": int, "sha256": str},
    "files": {"bytes": int, "sha256": str},
}
PART_KEYS: dict[str, type] = {"file": str, "bytes": int, "sha256": str}  # names of a tensor's further arrays
CHECKPOINT_ENDINGS = (".gguf", ".safetensors", ".pth", ".pt", ".bin")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

Storage = str | Grouping  # how a tensor is stored: a dtype's name, or in groups


class CheckpointError(NpllamaError):
    """A checkpoint can't be read or written; the message is one line: the file, what was found and what was expected."""


def takes_int8(name: str) -> bool:
    """Return whether a parameter can be quantised: the layers' matrices and a separate output matrix can.

    Norms can't, and neither can the embedding, tied or not: its rows are read and not multiplied.
    """
    return not name.endswith(("norm.weight", "tok_embeddings.weight"))


def stored_bytes(shape: tuple[int, ...], dtype: Storage) -> int:
    """Return how many bytes a parameter's numbers take on the disk, scales included."""
    if isinstance(dtype, Grouping):
        return dtype.stored_bytes(shape)
    scales = shape[0] * STORAGE["float32"].itemsize if dtype == "int8" else 0
    return math.prod(shape) * STORAGE[dtype].itemsize + scales


def is_plain_name(name: str) -> bool:
    """Return whether a name is a file's without a folder, on any system: no separator, drive, `..` or NUL, and not too long."""
    if name in ("", ".", "..") or "\0" in name or len(name) > 255:
        return False
    return PurePosixPath(name).name == name == PureWindowsPath(name).name


def check_names(where: object, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise a CheckpointError that says which names are missing or unexpected."""
    known, there = list(expected), set(found)
    if missing := [name for name in known if name not in there]:
        raise CheckpointError(f"{where}: {_some(missing)} missing")
    if unknown := sorted(there.difference(known)):
        raise CheckpointError(f"{where}: {_some(unknown)} unexpected")


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") + (" are" if len(names) > 1 else " is")
    )


def read_json(path: Path) -> dict[str, object]:
    """Read the JSON object in a file; CheckpointError if it is missing, is none, or exceeds JSON_LIMIT."""
    return foreign.read_json(path, CheckpointError)


def no_directory(path: Path) -> CheckpointError:
    """Return the error for a path that isn't a folder or doesn't exist."""
    expected = "expected a model directory"
    if line := convert_line(path):
        return CheckpointError(f"{path} is a checkpoint, {expected}: {line}")
    if path.exists():
        return CheckpointError(f"{path}: a file, {expected} (npllama convert makes one of a checkpoint)")
    names = ", and no name that `npllama models` lists" if NAME.fullmatch(str(path)) else ""
    return CheckpointError(f"{path}: not found{names}, {expected}")


def convert_line(path: Path) -> str | None:
    """Return the command line that converts a checkpoint to a model directory; None for a path that doesn't look like one."""
    target = path.resolve().with_suffix("").name
    if path.is_dir():
        with contextlib.suppress(OSError):
            names = {entry.name for entry in path.iterdir()}
            if not any(name.endswith(CHECKPOINT_ENDINGS) for name in names):
                return None
        target = path.resolve().name
    elif not (path.is_file() and path.name.endswith(CHECKPOINT_ENDINGS)):
        return None
    if Path(target or "model").exists() or not target:
        target = f"{target or 'model'}-npllama"
    return shlex.join(["npllama", "convert", str(path), target])


def read_manifest(path: Path) -> Manifest:
    """Read a directory's manifest.json, which lists the files with their sizes and hashes, and check its form."""
    file = path / "manifest.json"
    if not path.is_dir():
        raise no_directory(path)
    if not file.exists() and (line := convert_line(path)):
        raise CheckpointError(f"{path} is a checkpoint, expected a model directory: {line}")
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
            if section == "tensors":
                if entry["dtype"] == GROUPED:
                    _check_grouping(f"{file}: {section}: {name!r}: grouping", entry.get("grouping"))
                for part in _further_parts(entry):
                    _check_entry(f"{file}: {section}: {name!r}: {part}", entry.get(part), PART_KEYS)
                    named.append(entry[part]["file"])
            if not all(map(is_plain_name, named)):
                raise CheckpointError(f"{file}: {section}: {name!r} names a file outside the directory")
    return manifest


def _check_entry(where: str, entry: object, keys: Mapping[str, type]) -> None:
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in keys.items()):
        raise CheckpointError(f"{where}: expected an object with {', '.join(keys)}")


def _check_grouping(where: str, values: object) -> None:
    try:
        if not isinstance(values, dict):
            raise ValueError(f"{type(values).__name__}, expected an object")
        Grouping.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _further_parts(entry: Manifest) -> tuple[str, ...]:
    """Return the names of a tensor's arrays other than its values."""
    if entry["dtype"] == GROUPED:
        return ("scale", "unit") if entry["grouping"]["unit"] else ("scale",)
    return ("scale",) if entry["dtype"] == "int8" else ()


def array_files(tensors: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Return the manifest's entry of each .npy file, those of scales too, by the file's name."""
    entries = [part for t in tensors.values() for part in (t, *(t[name] for name in _further_parts(t)))]
    return {entry["file"]: entry for entry in entries}


def tensor_bytes(entry: Manifest) -> int:
    """Return how many bytes a tensor's files take together."""
    return sum(part["bytes"] for part in array_files({"": entry}).values())


def read_config(path: Path) -> tuple[Config, dict[str, object]]:
    """Read a directory's config.json: the constants, and the recommended settings."""
    file = path / "config.json"
    values = read_json(file)
    try:
        generation = check_generation(values.pop("generation", {}))
        return Config.from_dict(values), generation
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def check_generation(values: object) -> dict[str, object]:
    """Return the recommended settings with every key present, None where there is no recommendation."""
    defaults = {"chat_format": None, "system": None, "temperature": None, "top_p": None}
    if not isinstance(values, Mapping) or not set(values) <= set(defaults):
        raise ConfigError(f"generation is {shown(values)}, expected an object of {', '.join(defaults)}")
    settings = defaults | dict(values)
    for name, value in settings.items():
        if expected := setting_fault(name, value):
            raise ConfigError(f"generation: {name} is {shown(value)}, expected {expected}")
    return settings


def setting_fault(name: str, value: object) -> str | None:
    """Describe the expected values of a recommended setting that generate would refuse; None if the value is valid."""
    if value is None:
        return None
    if name in ("chat_format", "system"):
        return None if isinstance(value, str) else "a text or null"
    number = float(value) if type(value) is float or (type(value) is int and abs(value) < 1 << 64) else math.nan
    if name == "temperature":
        return None if 0 <= number < math.inf else "a number from 0"
    return None if 0 < number <= 1 else "a number above 0 and up to 1"
