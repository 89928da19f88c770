"""Repeat a piece of work, each time killed by a signal one change to the file system later.

    python killed.py WORK FOLDER SIGNAL [BEFORE]

The first run, in FOLDER/1, gets the signal before its first change, the second before its second, and so on until one run
finishes. Each run begins with a copy of the folder BEFORE. Python's audit events report the changes, whichever function makes
them; before one change means after the previous one. os.fsync, which has no event, is wrapped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from npllama import checkpoint, parameter_shapes
from npllama.checkpoint import atomic

import tiny

CONFIG = tiny.config(dim=24, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=40, vocab_size=30, n_layers=1)
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def write_model(path: Path, dtype: str, force: bool = False) -> None:
    """Write a model of CONFIG, the same numbers each time."""
    with checkpoint.create(path, CONFIG, dtype, {"kind": "test"}, force) as writer:
        for name, shape in parameter_shapes(CONFIG).items():
            writer.add(name, tiny.uniform(0, shape))


WORK: dict[str, Callable[[Path], None]] = {
    "model": lambda folder: write_model(folder / "m", "float32", force=True),
    "file": lambda folder: atomic.write_file(folder / "m", b"new"),
}


def at_each_change(work: str, folder: Path, number: int, before: Path | None = None) -> list[Path]:
    """Run this script in a separate process, and return the folders of the runs that got the signal."""
    command = [sys.executable, __file__, work, str(folder), str(int(number)), *([str(before)] if before else [])]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [folder / str(n) for n in range(1, int(done.stdout))]


def _end_before(nth: int, number: int) -> None:
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), number)

    def hear(event: str, args: tuple) -> None:
        if event in CHANGES or (event == "open" and args[2] & WRITING):
            change()

    def synced(descriptor: int, fsync=os.fsync) -> None:
        change()
        fsync(descriptor)
        change()

    os.fsync = synced
    sys.addaudithook(hear)


def main(work: str, folder: str, number: str, before: str | None = None) -> int:
    n = 0
    while True:
        n += 1
        place = Path(folder) / str(n)
        if before:
            shutil.copytree(before, place)
        else:
            place.mkdir(parents=True)
        if not (child := os.fork()):
            for name in ("SIGTERM", "SIGHUP", "SIGINT"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            _end_before(n, int(number))
            try:
                WORK[work](place)
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code)
        if (status := os.waitpid(child, 0)[1]) == 0:
            return n
        if os.WTERMSIG(status) != int(number) and os.WEXITSTATUS(status) != 128 + int(number):
            raise RuntimeError(f"run {n} ended with status {status}")


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
