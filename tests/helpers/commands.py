"""Run npllama's command line, in a new process or in this one."""

from __future__ import annotations

import subprocess
import sys

from npllama.cli import main

COMMAND = [sys.executable, "-m", "npllama"]


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, encoding="utf-8", **options)


def fails(capsys, *args: str, status: int = 2) -> str:
    """Run a command in this process, check that it fails with one line, and return that line."""
    assert main([str(arg) for arg in args]) == status
    out, err = capsys.readouterr()
    lines = (out + err).splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]
