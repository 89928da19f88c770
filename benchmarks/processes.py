"""Run each implementation in a process of its own, and measure them alternately."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.05  # seconds until the threads of the previous worker, which spin for a while, are asleep
# These slow a current NumPy down, or change the instructions that torch uses: no user's settings may influence the result.
REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "ONEDNN_MAX_CPU_ISA", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
THREADS = ("NPLLAMA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def prepare_environment(n_threads: int) -> None:
    """Set the environment of this process's children, and its own for the libraries that are not loaded yet."""
    for name in REMOVED:
        os.environ.pop(name, None)
    os.environ.update(dict.fromkeys(THREADS, str(n_threads)))


class Worker:
    """A module that speaks benchmarks.worker's protocol, in a process of its own; a context manager, ready inside its block."""

    def __init__(
        self,
        *arguments: str,
        module: str = "benchmarks.worker",
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        python: str = sys.executable,
    ):
        self.process = subprocess.Popen(
            [*launcher, python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | dict(environment or {}),
        )

    def ask(self, command: str) -> dict[str, float]:
        self._send(command)
        return self._answer()

    def peak_anonymous(self, command: str) -> int | None:
        """Return the peak anonymous memory in bytes while a command runs, sampled every few milliseconds."""
        self._send(command)
        peak = watch(self.process.pid, lambda: not _readable(self.process.stdout))
        self._answer()
        return peak

    def _send(self, command: str) -> None:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{' '.join(self.process.args)} ended with status {self.process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Worker:
        self._answer()  # the time to its first logits
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mpiexec() -> str | None:
    """Return the mpiexec of MPICH's package, next to this Python; None without it or without mpi4py."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) if importlib.util.find_spec("mpi4py") else None


def _readable(stream: object) -> bool:
    import select

    return bool(select.select([stream], [], [], 0)[0])


def anonymous_memory(pid: int) -> int | None:
    """Return how many bytes of a process's memory no file backs; None without /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None


def watch(pid: int, running) -> int | None:
    """Return the peak anonymous memory while running() is true."""
    peak = None
    while running():
        if (now := anonymous_memory(pid)) is not None:
            peak = max(peak or 0, now)
        time.sleep(0.005)
    return peak


@dataclass(frozen=True)
class Ask:
    """A command for one worker, in the first `rounds` rounds."""

    worker: str
    command: str
    rounds: int = 1 << 30


def alternate(workers: Mapping[str, Worker], asks: Iterable[Ask], rounds: int) -> dict[tuple[str, str], float]:
    """Ask the workers alternately, round after round; return the median seconds of each (worker, command)."""
    asks = list(asks)
    seconds: dict[tuple[str, str], list[float]] = {(ask.worker, ask.command): [] for ask in asks}
    for i in range(rounds):
        for ask in asks:
            if i < ask.rounds:
                time.sleep(PAUSE)
                seconds[ask.worker, ask.command].append(workers[ask.worker].ask(ask.command)["seconds"])
    return {key: statistics.median(found) for key, found in seconds.items()}
