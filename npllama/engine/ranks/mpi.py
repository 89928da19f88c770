"""Run the ranks as processes of MPI, on one machine or several: mpiexec -n 4 npllama generate ...

mpi4py, of the extra `mpi`, is imported only where an mpiexec has started more than one process. Rank 0 runs the command; the
others follow it. MPI can't cancel a pass that one rank has abandoned, as the others wait inside it: such a run ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import NpllamaError, reason
from .groups import Message, RankError, RankLost, described

# The variables in which MPICH's (also Intel's and Slurm's) and Open MPI's mpiexec give a process its rank, and their number.
VARIABLES = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
SPINNING = 2e-3  # seconds that a wait for the next message polls without a pause
PAUSE = 2e-4


def launched() -> tuple[int, int] | None:
    """Return this process's rank and the number of ranks from the variables that mpiexec sets; None for one process alone."""
    for rank, size in VARIABLES:
        with_rank, with_size = os.environ.get(rank, ""), os.environ.get(size, "")
        if with_rank.isdecimal() and with_size.isdecimal() and int(with_size) > 1:
            return int(with_rank), int(with_size)
    return None


@functools.cache
def world() -> World | None:
    """Return the group of all processes that mpiexec has started; None for one alone.

    Raises NpllamaError without mpi4py, and where mpi4py's MPI knows nothing of the others.
    """
    if (told := launched()) is None:
        return None
    if "OMPI_COMM_WORLD_SIZE" in os.environ and not {"MPI4PY_MPIABI", "MPI4PY_LIBMPI"} & os.environ.keys():
        os.environ["MPI4PY_MPIABI"] = "openmpi"  # mpi4py's wheels would take an MPICH first, if that is installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # "suspicious MPI execution environment": reported below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise NpllamaError(
            f"{told[1]} processes were started by mpiexec, but mpi4py can't be used ({reason(error)}): "
            "expected pip install 'npllama[mpi]'"
        ) from None
    if MPI.COMM_WORLD.Get_size() != told[1]:
        library = " ".join(MPI.Get_library_version().split("\n")[0].partition(",")[0].split())[:40]
        raise NpllamaError(
            f"mpiexec started {told[1]} processes, but by mpi4py each is alone: expected the mpiexec of its library, {library}"
        )
    return World(MPI)


class World:
    """The group of all processes of the run, on rank 0 and on the others."""

    running = True  # each of MPI's functions waits for the other ranks, whenever it is called

    def __init__(self, MPI: Any):
        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self._abandoned = self._closed = False

    def total(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        y = np.array(x, order="C")
        self._comm.Allreduce(self._mpi.IN_PLACE, y)
        return y

    def gather(self, x: np.ndarray, sizes: Sequence[int]) -> np.ndarray:  # noqa: D102
        n = x.size // x.shape[-1] if x.shape[-1] else int(np.prod(x.shape[:-1]))
        flat = np.empty(n * sum(sizes), x.dtype)
        self._comm.Allgatherv(np.ascontiguousarray(x).reshape(-1), [flat, [n * size for size in sizes]])
        y, start = np.empty((n, sum(sizes)), x.dtype), 0
        for size in sizes:
            y[:, start : start + size] = flat[n * start : n * (start + size)].reshape(n, size)
            start += size
        return y.reshape(*x.shape[:-1], sum(sizes))

    def broadcast(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        code = np.frombuffer(x.dtype.char.encode(), np.uint8).copy()
        self._comm.Bcast(code)
        y = np.array(x, np.dtype(chr(code[0])), order="C")
        self._comm.Bcast(y)
        return y

    def send(self, message: Message | None) -> None:
        """Send the other ranks a message; None ends them."""
        if self._abandoned:
            raise RankLost("a pass was abandoned, which MPI can't cancel on the other ranks: expected a new run")
        data = b"" if message is None else json.dumps(message).encode()
        self._comm.Ibcast(np.array([len(data)], np.int64)).Wait()
        if data:
            self._comm.Bcast(np.frombuffer(data, np.uint8).copy())

    def receive(self) -> Message | None:
        """Wait for the next message, sleeping once it takes longer; None when rank 0 has ended."""
        length, started = np.zeros(1, np.int64), time.perf_counter()
        request = self._comm.Ibcast(length)
        while not request.Test():
            if time.perf_counter() - started > SPINNING:
                time.sleep(PAUSE)
        if not length[0]:
            return None
        data = np.empty(length[0], np.uint8)
        self._comm.Bcast(data)
        message: Message = json.loads(data.tobytes())
        return message

    def agree(self, error: BaseException | None) -> None:
        """Wait until all ranks have loaded. Raises RankError on every rank if one could not."""
        texts = self._comm.allgather(None if error is None else described(error))
        for rank, text in enumerate(texts):
            if text is not None:
                raise RankError(f"rank {rank}: {text}") from error

    def report(self, error: BaseException) -> None:
        """Print why the pass under way has failed here, and end all ranks, which wait for this one."""
        print(f"npllama: rank {self.rank}: {described(error)}", file=sys.stderr)
        _leave(2)

    def abandon(self) -> None:
        """Note that the other ranks wait inside a pass, where they receive no message."""
        self._abandoned = True

    def check(self) -> None:
        """Do nothing: mpiexec ends the run with the first rank that ends."""

    def close(self) -> None:
        """End the other ranks, as rank 0, unless they wait inside a pass."""
        if not self._abandoned and not self._closed:
            self.send(None)
            self._closed = True

    def end(self, status: int) -> None:
        """End the other ranks, as rank 0; where they wait inside a pass, end this process too, with its exit status."""
        if self._abandoned:
            _leave(status)
        self.close()

    def threads(self, together: int | None) -> int:
        """Return the number of threads of this rank, so that all threads on one machine have a processor each.

        `together` is the most that the ranks of a machine may have in all; None: as many as it has processors.
        """
        own = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        local = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        all_cpus: set[int] = set().union(*local.allgather(own))  # some mpiexec pin each rank to processors of its own
        most = len(all_cpus) if together is None else min(together, len(all_cpus))
        return max(1, min(len(own), most // local.Get_size()))


def _leave(status: int) -> None:
    """End this process without MPI_Abort, which would print lines of its own; mpiexec then ends the others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    with contextlib.suppress(OSError):  # MPICH removes its shared memory when it ends as it should
        for line in Path("/proc/self/maps").read_text().splitlines():
            file = Path("/", line.partition("/")[2])
            if file.name.startswith("mpich_shm_"):
                file.unlink(missing_ok=True)
    os._exit(status)
