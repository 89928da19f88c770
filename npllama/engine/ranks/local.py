"""Ranks as processes of one machine, which add up in shared memory.

For a sum, each rank writes its summand into its slot and raises its flag to the number of the sum; when all flags are there,
it adds up all slots in the order of the ranks. Two sets of slots take turns, so that one wait a sum is enough: none can be two
sums ahead. Waiting spins for a moment, as the others are about to arrive, and then gives the processor up.

The memory has no name in any file system, so that nothing is left of it however the processes end. What is to be done next is
sent through a pipe, whose end tells a rank that rank 0 has ended; another pipe brings errors to rank 0, and its end tells that
a rank has. A pass that rank 0 gives up is recognised by what comes after it: a message, or a flag far beyond the own one.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import NpllamaError
from ..threads import available_cpus
from .groups import Abandoned, Message, RankError, described

SLOT = 4 << 20  # bytes that each rank adds or gathers at once
FLAG = 64  # bytes from one flag to the next: each in a cache line of its own
HEADER = 4096
SPINS = 2000  # looks at a flag, about a tenth of a millisecond
YIELDING = 2e-3  # seconds: afterwards a wait sleeps
CHECKED = 0.01  # seconds between looks whether all are still there
GIVEN_UP = 1 << 32  # sums that the next pass is counted ahead, after one that was given up
# `-c` puts the current folder in front of the path, where a file of the user's may have the name of a module.
WORKER = "import sys; sys.path[:] = filter(None, sys.path); from npllama.engine.ranks.following import main; main()"

_lock = threading.Lock()


def _fence() -> None:
    """Have all that was written before be seen by the other ranks before all that is written after.

    On x86 it always is. Elsewhere a lock is such a barrier: what is before its release, and after its next acquisition, stays
    so.
    """
    with _lock:
        pass
    with _lock:
        pass


class LocalGroup:
    """What rank 0 and the other ranks have in common."""

    running = False  # whether a pass is under way

    def __init__(self, rank: int, size: int, memory: mmap.mmap):
        self.rank, self.size, self.seq = rank, size, 0
        self._flags = memoryview(memory)[: FLAG * size].cast("q")
        self._bytes = np.frombuffer(memory, np.uint8, 2 * size * SLOT, offset=HEADER).reshape(2, size, SLOT)
        self._slots: dict[np.dtype, np.ndarray] = {}
        self._spins = SPINS if size <= available_cpus() else 0

    def total(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        x = np.ascontiguousarray(x)
        flat, y = x.reshape(-1), np.empty(x.size, x.dtype)
        slots = self._of(x.dtype)
        for start in range(0, flat.size, slots.shape[-1]):
            part = flat[start : start + slots.shape[-1]]
            turn = self._put(slots, part)
            out = y[start : start + part.size]
            np.add(turn[0, : part.size], turn[1, : part.size], out=out)
            for other in turn[2:]:
                out += other[: part.size]
        return y.reshape(x.shape)

    def gather(self, x: np.ndarray, sizes: Sequence[int]) -> np.ndarray:  # noqa: D102
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # a share may be empty
        y = np.empty((len(rows), sum(sizes)), x.dtype)
        slots = self._of(x.dtype)
        step = slots.shape[-1] // max(sizes)
        if not step:
            raise NpllamaError(f"a rank's share of {max(sizes):,} numbers: expected at most {slots.shape[-1]:,}")
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            turn, start = self._put(slots, np.ascontiguousarray(part).reshape(-1)), 0
            for rank, size in enumerate(sizes):
                y[first : first + step, start : start + size] = turn[rank, : len(part) * size].reshape(len(part), size)
                start += size
        return y.reshape(*x.shape[:-1], sum(sizes))

    def broadcast(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        code = np.frombuffer(x.dtype.char.encode(), np.uint8)  # what a tap returns may have another dtype
        dtype = np.dtype(chr(self._first(code)[0]))
        flat, y = np.ascontiguousarray(x, dtype).reshape(-1), np.empty(x.size, dtype)
        n = SLOT // dtype.itemsize
        for start in range(0, flat.size, n):
            y[start : start + n] = self._first(flat[start : start + n])
        return y.reshape(x.shape)

    def _first(self, x: np.ndarray) -> np.ndarray:
        """Return rank 0's x, in its slot."""
        return self._put(self._of(x.dtype), x if self.rank == 0 else x[:0])[0, : x.size]

    def _of(self, dtype: np.dtype) -> np.ndarray:
        """Return the slots as numbers of a dtype.    [2, size, numbers]"""
        if dtype not in self._slots:
            self._slots[dtype] = self._bytes.view(dtype)
        return self._slots[dtype]

    def _put(self, slots: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Write x into this rank's slot and wait until all ranks have; return all slots, valid until the next but one."""
        if not self.running:
            raise RankError("one rank's part of the parameters was computed with alone: expected the model's own mapping")
        self.seq += 1
        turn = slots[self.seq & 1]
        turn[self.rank, : x.size] = x
        _fence()
        self._flags[self.rank * FLAG // 8] = self.seq
        for rank in range(self.size):
            if rank != self.rank:
                self._wait(rank * FLAG // 8)
        _fence()
        return turn

    def _wait(self, flag: int) -> None:
        flags, seq = self._flags, self.seq
        for _ in range(self._spins):
            if flags[flag] >= seq:
                break
        else:
            self._wait_long(flag)
        if flags[flag] > seq + 1:  # no rank can be two sums ahead within a pass
            raise Abandoned("the pass was given up")

    def _wait_long(self, flag: int) -> None:
        flags, seq = self._flags, self.seq
        started = checked = time.perf_counter()
        while flags[flag] < seq:
            now = time.perf_counter()
            if now - started < YIELDING:
                os.sched_yield()
                continue
            time.sleep(min(1e-3, (now - started) / 20))
            if now - checked > CHECKED:
                checked = now
                self._check(flag)

    def _check(self, flag: int) -> None:
        """Raise an error if the rank of a flag that isn't raised will never raise it."""
        raise NotImplementedError


class Workers(LocalGroup):
    """The group as rank 0 has it: it starts the other ranks, and ends them."""

    def __init__(self, size: int, order: Message):
        if os.name != "posix" or not sys.executable:
            raise NpllamaError("several processes need a POSIX system and a Python to start: expected 1 process here")
        n_bytes = HEADER + 2 * size * SLOT
        with contextlib.ExitStack() as stack:
            if hasattr(os, "memfd_create"):
                descriptor = os.memfd_create("npllama")
                stack.callback(os.close, descriptor)
            else:  # a file whose name is gone before anything is in it
                descriptor = stack.enter_context(tempfile.TemporaryFile()).fileno()
            os.ftruncate(descriptor, n_bytes)
            super().__init__(0, size, mmap.mmap(descriptor, n_bytes))
            self._broken, self._owner, self._base, self._gave_up = "", os.getpid(), 0, False
            self._heard: dict[int, bytes] = {}  # by rank: what has come of a report
            self._processes: list[subprocess.Popen[bytes]] = []
            try:
                for rank in range(1, size):
                    self._processes.append(start_process(rank, size, descriptor))
                self._write(order)
            except BaseException:
                self.close()
                raise

    def wait_until_loaded(self) -> None:
        """Return when every rank has its part of the model; raise RankError for one that has failed."""
        try:
            waiting = set(range(1, self.size))
            while waiting:
                for rank in self._readable(sorted(waiting), None):
                    if "ready" in self._report_of(rank):
                        waiting.remove(rank)
        except BaseException:
            self.close()
            raise

    def send(self, message: Message) -> None:  # noqa: D102
        if self._gave_up:  # the flags of some ranks may be anywhere in the pass before
            self.seq = (self.seq // GIVEN_UP + 1) * GIVEN_UP
            self._gave_up = False
        self._base = self.seq
        self._write({**message, "seq": self.seq})

    def abandon(self) -> None:  # noqa: D102
        self._gave_up = True
        with contextlib.suppress(RankError):
            self._write({"abandon": True})

    def close(self) -> None:  # noqa: D102
        if os.getpid() != self._owner:  # a child that was forked
            return
        self._broken = self._broken or "the other ranks have been ended"
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _write(self, message: Message) -> None:
        if self._broken:
            raise RankError(self._broken)
        # An interrupt may cut a message short. The line break in front ends what came of it, which no rank can read.
        data = b"\n" + json.dumps(message).encode() + b"\n"
        for rank, process in enumerate(self._processes, 1):
            rest = memoryview(data)
            while rest and process.stdin:
                try:
                    rest = rest[os.write(process.stdin.fileno(), rest) :]
                except BrokenPipeError:
                    self._lose(rank)

    def _check(self, flag: int) -> None:
        for rank in self._readable(list(range(1, self.size)), 0):
            report = self._report_of(rank)
            if report.get("seq", -1) >= self._base:  # else it is of a pass that was given up
                raise RankError(f"rank {rank}: {report['error']}")

    def _readable(self, ranks: Sequence[int], timeout: float | None) -> list[int]:
        """Return the ranks that have reported something, or ended."""
        pipes = {process.stdout: rank for rank, process in enumerate(self._processes, 1) if rank in ranks and process.stdout}
        found, _, _ = select.select(list(pipes), [], [], timeout)
        return [pipes[pipe] for pipe in found]

    def _report_of(self, rank: int) -> Message:
        """Return a report, nothing if more of it is to come. Raises RankError where the rank has ended or can't load."""
        pipe = self._processes[rank - 1].stdout
        if not (data := os.read(pipe.fileno(), 1 << 16) if pipe else b""):
            self._lose(rank)
        line, end, rest = (self._heard.get(rank, b"") + data).partition(b"\n")
        self._heard[rank] = rest if end else line
        report: Message = json.loads(line) if end else {}
        if "failed" in report:
            raise RankError(f"rank {rank}: {report['failed']}")
        return report

    def _lose(self, rank: int) -> None:
        process = self._processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        code = process.returncode
        how = f"was ended by {_signal_name(-code)}" if code is not None and code < 0 else f"ended with status {code}"
        self._broken = f"rank {rank} of {self.size} (process {process.pid}) {how}"
        self.close()
        raise RankError(self._broken)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def start_process(rank: int, size: int, descriptor: int) -> subprocess.Popen[bytes]:
    """Start the process of a rank, in a session of its own: a terminal's Ctrl-C is for rank 0, which tells the others."""
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(rank), str(size), str(descriptor)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[descriptor],
        start_new_session=True,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": path},
    )


class Worker(LocalGroup):
    """The group as another rank than 0 has it, whose standard input and output are the pipes to rank 0."""

    running = True

    def __init__(self, rank: int, size: int, descriptor: int):
        memory = mmap.mmap(descriptor, HEADER + 2 * size * SLOT)
        os.close(descriptor)
        super().__init__(rank, size, memory)
        self._in, self._out = os.dup(0), os.dup(1)
        os.dup2(2, 1)  # what anything prints is not a report
        self._read = b""

    def receive(self) -> Message | None:  # noqa: D102
        while True:
            line, end, rest = self._read.partition(b"\n")
            if not end:
                if not (data := os.read(self._in, 1 << 16)):
                    return None
                self._read += data
                continue
            self._read = rest
            try:
                message: Message = json.loads(line or b"{}")
            except ValueError:  # cut short by an interrupt of rank 0
                continue
            if "seq" in message:
                self.seq = message["seq"]
            if message and "abandon" not in message:
                return message

    def report(self, error: BaseException) -> None:
        """Tell rank 0 that the pass under way has failed here."""
        self._tell({"seq": self.seq, "error": described(error)})

    def loaded(self, error: BaseException | None = None) -> None:
        """Tell rank 0 that this rank has its part of the model, or why not."""
        self._tell({"ready": True} if error is None else {"failed": described(error)})

    def _tell(self, report: Message) -> None:
        with contextlib.suppress(BrokenPipeError):  # rank 0 has ended, which the next receive() finds
            os.write(self._out, json.dumps(report).encode() + b"\n")

    def _check(self, flag: int) -> None:
        """Find out whether rank 0 has ended or goes on with something else; it first raises its flag in what is done."""
        if (self._read or select.select([self._in], [], [], 0)[0]) and self._flags[flag] < self.seq:
            raise Abandoned("the pass was given up")


def threads_of_each(size: int, n_threads: int) -> int:
    """Return how many threads each of the ranks computes with: together no more than there are processors."""
    return max(1, min(n_threads, available_cpus() // size))


def pin(rank: int, size: int) -> None:
    """Keep a rank's threads on its share of the processors, where there are enough and the system can do it."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cpus = sorted(os.sched_getaffinity(0))
    if size <= len(cpus):
        own = cpus[rank * len(cpus) // size : (rank + 1) * len(cpus) // size]
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, own)
