"""Verify a model directory by the sha256 of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from .atomic import survivor
from .format import array_files, read_manifest
from .reading import open_model
from .store import locate


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Hash every file and compare with the manifest. Return the problems, one line each; an empty list if nothing has changed.

    progress(done, total) is called with byte counts. Files that the manifest doesn't list are left alone, except for
    an .npy, which could be taken for a parameter. Raises CheckpointError if `path` is not a model directory at all.
    """
    path = survivor(locate(path))
    manifest = read_manifest(path)
    listed = array_files(manifest["tensors"]) | manifest["files"]
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
    """Return the file's sha256 in hexadecimal; after each block, `stop` tells whether to end early."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while (n := file.readinto(block)) and not stop():
            digest.update(memoryview(block)[:n])
    return digest.hexdigest()
