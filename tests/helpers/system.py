"""The repository's folder and its scripts, processes that one has started, and their settings: signals, a full disk."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="this system has no /proc to find a process's children in"
)


def workers_of(pid: int) -> list[int]:
    """Return the processes that this one has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def script(path: str) -> ModuleType:
    """Import a script of the repository that is in no package, such as docs/make_course.py, with what is in its folder."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # where Python finds what a script imports
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def hear_signals() -> None:
    """Restore signals, for Popen's preexec_fn: a shell's background jobs ignore SIGINT, and nohup's ignore SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Limit the size of files: a write beyond it fails or is cut short, as on a full disk."""
    resource = pytest.importorskip("resource", reason="this system has no limits for a process")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
