"""An environment of its own for each implementation: python -m venv, and pip with pinned versions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .implementations import TORCH, Implementation

ROOT = Path(__file__).resolve().parents[2]
INSTALL_SECONDS = 1500


class NotInstalled(Exception):
    """Raised when pip can't install an implementation; the message is pip's reason."""


def environment(implementation: Implementation, folder: Path) -> Path:
    """Return the Python of the implementation's environment, which is made unless it is there. Raises NotInstalled."""
    if implementation.why_not:
        raise NotInstalled(implementation.why_not)
    wanted = {"packages": implementation.packages, "without dependencies": implementation.without_dependencies}
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]
    place = folder / f"{implementation.name}-{key}"
    python = place / "bin" / "python"
    if (place / "complete").exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    if TORCH in implementation.packages:
        shutil.copytree(_with_torch(folder), place, symlinks=True, copy_function=os.link)
    else:
        _run([sys.executable, "-m", "venv", str(place)])
    _pip(python, implementation.packages)
    if implementation.without_dependencies:
        _pip(python, ("--no-deps", *implementation.without_dependencies))
    (place / "complete").touch()
    return python


def _with_torch(folder: Path) -> Path:
    """Return an environment with torch alone, of which others are copies by hard links: unpacking it takes minutes."""
    place = folder / "torch"
    if not (place / "with-torch").exists():
        shutil.rmtree(place, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(place)])
        _pip(place / "bin" / "python", (TORCH, "numpy==2.4.6"))
        (place / "with-torch").touch()
    return place


def _pip(python: Path, packages: tuple[str, ...]) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *packages])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"installing took more than {INSTALL_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line or "error:" in line.lower()] or lines[-1:] or ["no reason given"]
        raise NotInstalled(errors[-1].strip()[:400])


def import_path(folder: Path) -> Path:
    """Return a folder to import this checkout's npllama and npllama_convert from, for the adapter that needs them."""
    place = folder / "import"
    place.mkdir(parents=True, exist_ok=True)
    for name, source in (("npllama", "npllama"), ("npllama_convert", "convert")):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / source)
    return place
