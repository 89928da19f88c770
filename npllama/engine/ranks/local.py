"""Run the ranks as processes of one machine, which make their sums in shared memory.

For a sum, each rank writes its summand into its slot and sets its flag to the number of the sum; once all flags have that
number, it adds up all slots in the order of the ranks. Two sets of slots alternate, so that one wait for each sum is enough: no
rank can be two sums ahead. A waiting rank spins for a moment, as the others are about to arrive, then yields the processor,
then marks itself as asleep and blocks on a pipe, its bell: a rank that sets its flag writes into the bells of those asleep.

The memory has no name in any file system, so that nothing is left of it however the processes end. Each rank receives the next
message through a pipe, which reaches its end when rank 0 ends; it reports errors through another, which reaches its end when
the rank ends. A rank recognises an abandoned pass by what follows it: a message, or a flag far above its own.
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
from .groups import Abandoned, Message, RankError, RankLost, described

SLOT = 4 << 20  # bytes that each rank adds or gathers at once
FLAG = 64  # bytes from one flag to the next: each in a cache line of its own
ASLEEP = 1  # numbers from a rank's flag to its mark that it is asleep
HEADER = 4096
SPINS = 2000  # reads of a flag, about a tenth of a millisecond
YIELDING = 5e-4  # seconds: afterwards a wait blocks
CHECKED = 10  # milliseconds that a wait blocks at most: were a bell missed, no more would be lost
READABLE = getattr(select, "POLLIN", 0)  # poll(), as select() takes no descriptor above 1023 and each mapped file has one
ABANDONED = 1 << 32  # added to the number of the next sum after an abandoned pass
# `-c` puts the current folder first on the path, where one of the user's files may have the name of a module.
WORKER = "import sys; sys.path[:] = filter(None, sys.path); from npllama.engine.ranks.following import main; main()"

_lock = threading.Lock()


def _fence() -> None:
    """Make the other ranks see what was written before this before they see what is written after it (a memory barrier).

    On x86 they always do. Elsewhere a lock is such a barrier: no access moves across its release and its next acquisition.
    """
    with _lock:
        pass
    with _lock:
        pass


class LocalGroup:
    """The part of a group that rank 0 and the other ranks have in common."""

    running = False  # whether a pass is under way

    def __init__(self, rank: int, size: int, memory: mmap.mmap, bells: list[int]):
        self.rank, self.size, self.seq = rank, size, 0
        self._bells = bells  # for each rank the end of a pipe that it reads, and the end that the others write
        self._alarms = select.poll()  # what ends a wait: this rank's bell, and a message
        self._alarms.register(bells[2 * rank], READABLE)
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
        _fence()
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            if self._flags[rank * FLAG // 8 + ASLEEP]:
                with contextlib.suppress(BlockingIOError):  # it is full: it rings already
                    os.write(self._bells[2 * rank + 1], b"\0")
        for rank in others:
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
            raise Abandoned("the pass was abandoned")

    def _wait_long(self, flag: int) -> None:
        flags, seq, until = self._flags, self.seq, time.perf_counter() + YIELDING
        while flags[flag] < seq:
            if time.perf_counter() < until:
                os.sched_yield()
                continue
            own = self.rank * FLAG // 8 + ASLEEP
            flags[own] = 1
            _fence()
            if flags[flag] < seq:
                self._alarms.poll(CHECKED)
            flags[own] = 0
            with contextlib.suppress(BlockingIOError):  # nothing in it
                os.read(self._bells[2 * self.rank], 1 << 16)
            self._check(flag)

    def _check(self, flag: int) -> None:
        """Raise an error if the rank of this flag will never set it to the number awaited."""
        raise NotImplementedError


class Workers(LocalGroup):
    """The group on rank 0, which starts the other ranks and ends them."""

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
            super().__init__(0, size, mmap.mmap(descriptor, n_bytes), make_bells(size))
            self._broken, self._owner, self._base, self._abandoned = "", os.getpid(), 0, False
            self._heard: dict[int, bytes] = {}  # by rank: the part of a report received so far
            self._processes: list[subprocess.Popen[bytes]] = []
            try:
                for rank in range(1, size):
                    self._processes.append(start_process(rank, size, descriptor, self._bells))
                    self._alarms.register(self._reports_of(rank), READABLE)
                self._write(order)
            except BaseException:
                self.close()
                raise

    def wait_until_loaded(self) -> None:
        """Wait until every rank has loaded its part of the model. Raises RankError for one that has failed."""
        try:
            waiting = set(range(1, self.size))
            while waiting:
                for rank in self._readable(sorted(waiting), None):
                    if self._read_reports(rank):  # the first one is that it's ready
                        waiting.remove(rank)
        except BaseException:
            self.close()
            raise

    def send(self, message: Message) -> None:  # noqa: D102
        if self._abandoned:  # the flags of some ranks may be anywhere in the pass before
            self.seq = (self.seq // ABANDONED + 1) * ABANDONED
            self._abandoned = False
        self._base = self.seq
        self._write({**message, "seq": self.seq})

    def abandon(self) -> None:  # noqa: D102
        self._abandoned = True
        with contextlib.suppress(RankError):
            self._write({"abandon": True})

    def check(self) -> None:  # noqa: D102
        for rank in self._readable(range(1, self.size), 0):
            self._read_reports(rank)  # of an abandoned pass, if the rank hasn't ended

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
        while self._bells:
            os.close(self._bells.pop())

    def _write(self, message: Message) -> None:
        if self._broken:
            raise RankLost(self._broken)
        # An interrupt may cut a message short. The line break in front ends that fragment, which no rank can parse.
        data = b"\n" + json.dumps(message).encode() + b"\n"
        for rank, process in enumerate(self._processes, 1):
            rest = memoryview(data)
            while rest and process.stdin:
                try:
                    rest = rest[os.write(process.stdin.fileno(), rest) :]
                except BrokenPipeError:
                    self._lose(rank)

    def _check(self, flag: int) -> None:
        for rank in self._readable(range(1, self.size), 0):
            for report in self._read_reports(rank):
                if report["seq"] >= self._base:  # else it is about an abandoned pass
                    raise RankError(f"rank {rank}: {report['error']}")

    def _readable(self, ranks: Sequence[int], timeout: float | None) -> list[int]:
        """Return the ranks that have reported something, or ended."""
        pipes, poll = {self._reports_of(rank): rank for rank in ranks}, select.poll()
        for pipe in pipes:
            poll.register(pipe, READABLE)
        return [pipes[pipe] for pipe, _ in poll.poll(timeout)]

    def _reports_of(self, rank: int) -> int:
        """Return the descriptor that a rank's reports are read from."""
        pipe = self._processes[rank - 1].stdout
        if pipe is None or pipe.closed:
            raise RankLost(self._broken)
        return pipe.fileno()

    def _read_reports(self, rank: int) -> list[Message]:
        """Return the reports that are complete. Raises RankError where the rank has ended or can't load."""
        if not (data := os.read(self._reports_of(rank), 1 << 16)):
            self._lose(rank)
        *lines, self._heard[rank] = (self._heard.get(rank, b"") + data).split(b"\n")
        reports: list[Message] = [json.loads(line) for line in lines]
        for report in reports:
            if "failed" in report:
                raise RankError(f"rank {rank}: {report['failed']}")
        return reports

    def _lose(self, rank: int) -> None:
        process = self._processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        code = process.returncode
        how = f"was ended by {_signal_name(-code)}" if code is not None and code < 0 else f"ended with status {code}"
        self._broken = f"rank {rank} of {self.size} (process {process.pid}) {how}"
        self.close()
        raise RankLost(self._broken)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def make_bells(size: int) -> list[int]:
    """Return two descriptors for each rank: of a pipe, the end that it reads and the end that the others write."""
    bells = [end for _ in range(size) for end in os.pipe()]
    for end in bells:
        os.set_blocking(end, False)
    return bells


def start_process(rank: int, size: int, descriptor: int, bells: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start the process of a rank, in a session of its own: a terminal's Ctrl-C reaches rank 0 alone, which ends the others."""
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, (rank, size, descriptor, *bells))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[descriptor, *bells],
        start_new_session=True,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": path},
    )


class Worker(LocalGroup):
    """The group on any other rank, whose standard input and output are the pipes to rank 0."""

    running = True

    def __init__(self, rank: int, size: int, descriptor: int, bells: list[int]):
        memory = mmap.mmap(descriptor, HEADER + 2 * size * SLOT)
        os.close(descriptor)
        super().__init__(rank, size, memory, bells)
        self._in, self._out = os.dup(0), os.dup(1)
        self._alarms.register(self._in, READABLE)
        os.dup2(2, 1)  # what libraries print is not a report
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
        """Report to rank 0 that this rank has loaded its part of the model, or why it can't."""
        self._tell({"ready": True} if error is None else {"failed": described(error)})

    def _tell(self, report: Message) -> None:
        with contextlib.suppress(BrokenPipeError):  # rank 0 has ended, which the next receive() finds
            os.write(self._out, json.dumps(report).encode() + b"\n")

    def _check(self, flag: int) -> None:
        """Raise Abandoned if rank 0 has ended or has begun another pass: then it never sets the flag of this one."""
        poll = select.poll()
        poll.register(self._in, READABLE)
        if (self._read or poll.poll(0)) and self._flags[flag] < self.seq:
            raise Abandoned("the pass was abandoned")


def threads_of_each(size: int, n_threads: int) -> int:
    """Return the number of threads of each rank: together no more than there are processors."""
    return max(1, min(n_threads, available_cpus() // size))


def pin(rank: int, size: int) -> None:
    """Pin a rank's threads to its share of the processors, where there are enough and the system can do it."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cpus = sorted(os.sched_getaffinity(0))
    if size <= len(cpus):
        own = cpus[rank * len(cpus) // size : (rank + 1) * len(cpus) // size]
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, own)
