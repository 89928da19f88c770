"""How many threads compute, and work shared among them.

NumPy lets go of Python's lock inside its loops and inside BLAS, so that Python threads compute side by side as long as each
call has enough to do. BLAS has threads of its own: while ours work, it gets one (through threadpoolctl; without that package
ours stay at one and BLAS keeps its own, which is slower for packed weights and long prompts).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

VARIABLE = "NPLLAMA_NUM_THREADS"


class _State:
    """What this process has found out or been told; made anew after a fork, where no other thread lives on."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.n_threads: int | None = None
        self.blas: list | None = None  # threadpoolctl's controllers of BLAS libraries; empty without threadpoolctl
        self.pool: ThreadPoolExecutor | None = None
        self.at_one = 0  # how many regions want BLAS at one thread
        self.before: list[int] = []  # its threads outside of them


_state = _State()
_this_thread = threading.local()  # .busy: it runs a task of parallel()


def _forget() -> None:
    global _state
    told = _state.n_threads
    _state = _State()
    _state.n_threads = told


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def available_cpus() -> int:
    """The processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def n_threads() -> int:
    """How many threads compute: what set_threads() said, else NPLLAMA_NUM_THREADS, else one for each processor.

    One within a task of parallel(): the others have tasks of their own.
    """
    if getattr(_this_thread, "busy", False):
        return 1
    if _state.n_threads is None:
        text = os.environ.get(VARIABLE)
        if not text:
            _state.n_threads = available_cpus()
        else:
            set_threads(_whole(text))
    return _state.n_threads


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{VARIABLE} is {text!r:.60}, expected a whole number from 1")
    return int(text)


def set_threads(n: int) -> None:
    """Compute with n threads from now on, BLAS too where threadpoolctl is installed. Raises ValueError below 1."""
    if n < 1:
        raise ValueError(f"the number of threads is {n}, expected 1 or more")
    with _state.lock:
        if _state.pool is not None:
            _state.pool.shutdown()
        _state.pool, _state.n_threads = None, n
        for library in _blas():
            _set(library, n)


def controls_blas() -> bool:
    """Whether BLAS's own threads can be set: threadpoolctl is installed and knows the BLAS that NumPy uses."""
    return bool(_blas())


def _blas() -> list:
    with _state.lock:
        if _state.blas is None:
            try:
                from threadpoolctl import ThreadpoolController
            except ImportError:
                _state.blas = []
            else:
                _state.blas = ThreadpoolController().select(user_api="blas").lib_controllers
        return _state.blas


def _set(library: object, n: int) -> None:
    """From any thread: threadpoolctl 3.8 otherwise obeys the first that asked, and no other. Ours take turns by the lock."""
    release = getattr(library, "clear_controlling_thread", lambda force=False: None)
    release(force=True)
    library.set_num_threads(n)
    release()


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """BLAS at one thread; regions may overlap, and the last to end gives it back what it had."""
    state, libraries = _state, _blas()
    with state.lock:
        if state.at_one == 0:
            state.before = [library.get_num_threads() for library in libraries]
            for library in libraries:
                _set(library, 1)
        state.at_one += 1
    try:
        yield
    finally:
        with state.lock:
            state.at_one -= 1
            if state.at_one == 0:
                for library, before in zip(libraries, state.before, strict=True):
                    _set(library, before)


def parallel(task: Callable[[int], object], n: int) -> None:
    """Run task(0) to task(n - 1), each thread taking the next when it is done with one. An exception of any is raised.

    A task that calls this again runs those tasks itself.
    """
    workers = min(n_threads(), n)
    if workers < 2 or not controls_blas():
        for i in range(n):
            task(i)
        return
    numbers = itertools.count()  # next() on it is one step under Python's lock
    failed = False

    def work() -> None:
        _this_thread.busy = True
        try:
            while not failed and (i := next(numbers)) < n:
                task(i)
        finally:
            _this_thread.busy = False

    with _one_blas_thread():
        others = [_pool().submit(work) for _ in range(workers - 1)]
        try:
            work()
        except BaseException:
            failed = True
            raise
        finally:
            wait(others)
    for other in others:
        other.result()


def _pool() -> ThreadPoolExecutor:
    with _state.lock:
        if _state.pool is None:
            _state.pool = ThreadPoolExecutor(max(1, n_threads() - 1), thread_name_prefix="npllama")
        return _state.pool
