"""Share work among threads.

NumPy releases Python's lock (the GIL) inside its loops and inside BLAS, so that Python threads compute in parallel as long as
each call has enough to do. BLAS has threads of its own: while ours work, it is limited to one, through threadpoolctl. With a
BLAS that threadpoolctl doesn't know, we use one thread and BLAS keeps its own, which is slower for packed weights and long
prompts.
"""

from __future__ import annotations

import _thread
import itertools
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

VARIABLE = "NPLLAMA_NUM_THREADS"


class _Blas(Protocol):
    """The methods of a threadpoolctl.LibController that are used here."""

    def get_num_threads(self) -> int: ...

    def set_num_threads(self, num_threads: int) -> object: ...


class _State:
    """Per-process thread settings; reset after a fork, which other threads don't survive."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.n_threads: int | None = None
        self.blas: list[_Blas] | None = None  # threadpoolctl's controllers of the BLAS libraries that it knows
        self.n_workers = 0  # threads of ours that wait for shares
        self.shares: SimpleQueue[_Share | None] = SimpleQueue()
        self.holders: set[int] = set()  # threads in a region, which need BLAS at one thread
        self.before: list[int] | None = None  # its threads otherwise; None while it has them


_state = _State()
_this_thread = threading.local()  # .region: whose tasks it runs


def _forget() -> None:
    global _state
    n_threads = _state.n_threads
    _state = _State()
    _state.n_threads = n_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def available_cpus() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_threads() -> int:
    """Return how many threads compute: set_threads()'s number, else NPLLAMA_NUM_THREADS, else one for each processor.

    Within a task of parallel() it is 1, since the other threads have tasks of their own.
    """
    region = getattr(_this_thread, "region", None)
    if region is not None and not region.over:
        return 1
    n = _state.n_threads
    if n is None:
        if text := os.environ.get(VARIABLE):
            set_threads(n := _whole(text))
        else:
            _state.n_threads = n = available_cpus()
    return n


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{VARIABLE} is {text!r:.60}, expected a whole number from 1")
    return int(text)


def set_threads(n: int) -> None:
    """Compute with n threads from now on, in BLAS too. Raises ValueError for n below 1."""
    if n < 1:
        raise ValueError(f"the number of threads is {n}, expected 1 or more")
    state, libraries = _state, _blas()
    with state.lock:
        state.n_threads = n
        while state.n_workers > n - 1:
            state.shares.put(None)  # ends one
            state.n_workers -= 1
        state.before = [n] * len(libraries)
        state.holders.discard(threading.get_ident())
        if not state.holders:  # else the last thread to leave a region sets them
            _restore(state)


def controls_blas() -> bool:
    """Return whether the number of BLAS's own threads can be set: whether threadpoolctl knows NumPy's BLAS."""
    return bool(_blas())


def _blas() -> list[_Blas]:
    with _state.lock:
        if _state.blas is None:
            from threadpoolctl import ThreadpoolController  # slow, as it inspects every library of the process: not at import

            _state.blas = ThreadpoolController().select(user_api="blas").lib_controllers
        return _state.blas


def _set(library: _Blas, n: int) -> None:
    """Set a BLAS's number of threads, from any thread of ours that holds the lock.

    threadpoolctl 3.8 by itself obeys only the first thread that asked.
    """
    release = getattr(library, "clear_controlling_thread", lambda force=False: None)
    release(force=True)
    library.set_num_threads(n)
    release()


# An interrupt (Ctrl-C) may come between any two steps of the main thread, here too. So nothing is held that a thread could wait
# for forever, and a setting that one region could not restore is restored by the same thread's next one.


def _hold(state: _State) -> None:
    """Limit BLAS to one thread, while at least one thread of ours is in a region."""
    with state.lock:
        if not state.holders - {threading.get_ident()}:
            if state.before is None:
                state.before = [library.get_num_threads() for library in _blas()]
            for library in _blas():
                _set(library, 1)
        state.holders.add(threading.get_ident())


def _release(state: _State) -> None:
    """Restore the threads that BLAS had, as the last to leave a region."""
    with state.lock:
        state.holders.discard(threading.get_ident())
        if not state.holders:
            _restore(state)


def _restore(state: _State) -> None:
    for library, before in zip(_blas(), state.before or (), strict=state.before is not None):
        _set(library, before)
    state.before = None


class _Region:
    """Tasks, of which each thread takes the next, until none is left or one has failed."""

    def __init__(self, task: Callable[[int], object], n: int):
        self.task, self.n = task, n
        self.numbers = itertools.count()  # next() on it is one step, under Python's lock and without it (3.13t)
        self.failed = self.over = False
        self.errors: list[BaseException] = []  # of other threads than the caller's

    def work(self) -> None:
        _this_thread.region = self
        try:
            while not self.failed and (i := next(self.numbers)) < self.n:
                self.task(i)
        except BaseException:
            self.failed = True
            raise
        finally:
            _this_thread.region = None


class _Share:
    """One worker's part of a region; the caller takes it back if no worker has begun it."""

    def __init__(self, region: _Region):
        self.region, self.taken, self.ended = region, threading.Lock(), threading.Lock()
        self.ended.acquire()

    def run(self) -> None:
        if self.taken.acquire(blocking=False):
            try:
                self.region.work()
            except BaseException as error:
                self.region.errors.append(error)
            finally:
                self.ended.release()

    def wait(self) -> None:
        if not self.taken.acquire(blocking=False):
            self.ended.acquire()


def _serve(shares: SimpleQueue[_Share | None]) -> None:
    """Run share after share, as a worker. None is kept afterwards, as their tasks hold arrays."""
    while (share := shares.get()) is not None:
        share.run()
        del share


def parallel(task: Callable[[int], object], n: int) -> None:
    """Run task(0) to task(n - 1), each thread taking the next when it has done one. An exception of any task is raised.

    A task that calls this again runs those tasks itself. When this returns or raises, all tasks that were begun have ended,
    unless an interrupt comes while it waits for them.
    """
    workers = min(n_threads(), n)
    if workers < 2 or not controls_blas():
        for i in range(n):
            task(i)
        return
    state, region, shares = _state, _Region(task, n), []
    try:
        _hold(state)
        with state.lock:
            while state.n_workers < workers - 1:
                # Not threading.Thread: its start() waits on a condition: interrupted there, it may raise RuntimeError.
                _thread.start_new_thread(_serve, (state.shares,))
                state.n_workers += 1
        for _ in range(workers - 1):
            shares.append(_Share(region))
            state.shares.put(shares[-1])
        region.work()
    except BaseException:
        region.failed = True
        raise
    finally:
        try:
            for share in shares:
                share.wait()
        finally:
            region.over = True
            _release(state)
    if region.errors:
        raise region.errors[0]
