"""The repository's folder, and what tests do to processes and disks."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def hear_signals() -> None:
    """For Popen's preexec_fn: what a shell runs in the background it starts deaf to SIGINT, and nohup to SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes: a write then fails, or is cut short, as on a full disk."""
    resource = pytest.importorskip("resource", reason="this system has no limits for a process")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
