"""Convert a checkpoint into the user's store once, and again when it has changed: `npllama run FILE`."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from npllama import checkpoint
from npllama.checkpoint import store

from . import conversion, gguf, hub, sources
from .conversion import Report

BELONGS = re.compile(r"\.(gguf|safetensors|pth|pt|bin|json|jinja|model|model\.v\d+)$")  # a checkpoint's files
KEY = "run"  # in the manifest's source: the checkpoint's files, sizes and times


def stored(src: str, report: Report = print) -> Path:
    """Return the model directory of a checkpoint, of any kind that convert reads; it is converted if it isn't stored yet.

    Its name is the checkpoint's, with a digest of its path. A folder of that name which holds other files is not replaced.
    Raises ValueError with one line.
    """
    remote = src.startswith(hub.PREFIX)
    path = src if remote else os.path.realpath(src)
    stem = re.sub(r"[^\w.-]+", "-", path.removeprefix(hub.PREFIX).rstrip("/").split("/")[-1].removesuffix(".gguf")).strip(".-_")
    name = f"{stem or 'model'}-{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    target, found = store.folder(name), {} if remote else _identity(Path(src))
    if target.exists():
        try:
            known = checkpoint.open_model(target).manifest["source"].get(KEY)
        except ValueError:
            known = None
        if known == {"path": path, "files": found}:
            return target
        report(f"{path} has changed since it was converted: it is converted again")
        checkpoint.check_free(target, force=True)
    source = sources.read(src, report=report)
    source.about[KEY] = {"path": path, "files": found}
    conversion.write(source, target, force=True, report=report)
    report(f"npllama chat -m {name} opens it again")
    return target


def _identity(src: Path) -> dict[str, list[int]]:
    """Return the size and time of a checkpoint's files, which show whether it has changed without reading it."""
    files = list(src.iterdir()) if src.is_dir() else gguf.find_files(src) if src.suffix == ".gguf" else [src]
    stats = {file.name: file.stat() for file in files if file.is_file() and BELONGS.search(file.name)}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in sorted(stats.items())}
