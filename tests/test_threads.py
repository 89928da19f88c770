"""Work shared among threads: all of it is done, once; errors arrive; BLAS gets its threads back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from npllama import threads


@pytest.fixture(autouse=True)
def as_before():
    before = threads.n_threads()
    yield
    threads.set_threads(before)


needs_threadpoolctl = pytest.mark.skipif(not threads.controls_blas(), reason="threadpoolctl is not installed")


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 100])
def test_every_task_runs_once(n_threads, n):
    threads.set_threads(n_threads)
    done = []
    threads.parallel(done.append, n)
    assert sorted(done) == list(range(n))


@needs_threadpoolctl
def test_tasks_run_side_by_side():
    threads.set_threads(2)
    both = threading.Barrier(2, timeout=60)
    threads.parallel(lambda i: both.wait(), 2)  # a barrier of two is passed by two threads only


@needs_threadpoolctl
@pytest.mark.parametrize("bad", [0, 7, 63])
def test_an_exception_arrives_and_blas_has_its_threads_again(bad):
    threads.set_threads(2)
    before = [library.get_num_threads() for library in threads._blas()]
    inside = []

    def task(i: int) -> None:
        inside.append(max(library.get_num_threads() for library in threads._blas()))
        if i == bad:
            raise RuntimeError(f"task {i}")

    with pytest.raises(RuntimeError, match=f"task {bad}"):
        threads.parallel(task, 64)
    assert set(inside) == {1}
    assert [library.get_num_threads() for library in threads._blas()] == before
    threads.parallel(lambda i: None, 4)  # and the pool still works


@needs_threadpoolctl
def test_after_an_exception_nothing_more_is_begun():
    threads.set_threads(2)
    begun = []

    def task(i: int) -> None:
        begun.append(i)
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError
        time.sleep(0.001)

    with pytest.raises(RuntimeError):
        threads.parallel(task, 5000)
    assert len(begun) < 1000


@needs_threadpoolctl
def test_two_callers_at_once_leave_blas_as_it_was():
    threads.set_threads(2)
    before = [library.get_num_threads() for library in threads._blas()]

    inside = set()

    def caller() -> None:
        for _ in range(200):
            threads.parallel(lambda i: inside.add(max(library.get_num_threads() for library in threads._blas())), 3)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert inside == {1}
    assert [library.get_num_threads() for library in threads._blas()] == before


@needs_threadpoolctl
def test_a_task_shares_its_own_work_with_nobody():
    """It would wait for a thread that waits for it."""
    threads.set_threads(2)
    done = []

    def task(i: int) -> None:
        assert threads.n_threads() == 1
        here = threading.get_ident()
        threads.parallel(lambda j: done.append((i, j, threading.get_ident() == here)), 3)
        if i == 5:
            raise RuntimeError

    threads.parallel(task, 5)
    assert sorted(done) == [(i, j, True) for i in range(5) for j in range(3)]
    with pytest.raises(RuntimeError):
        threads.parallel(task, 6)
    assert threads.n_threads() == 2


@needs_threadpoolctl
def test_set_threads_is_blas_threads_too():
    threads.set_threads(1)
    assert {library.get_num_threads() for library in threads._blas()} == {1}


@pytest.mark.parametrize("value", ["0", "-1", "two", " ", "1.5", "²"])
def test_a_bad_variable_is_one_line(value, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, value)
    monkeypatch.setattr(threads._state, "n_threads", None)
    with pytest.raises(ValueError, match="number"):
        threads.n_threads()


def test_the_variable_is_taken(monkeypatch):
    for value, expected in (("3", 3), ("", threads.available_cpus())):  # empty is as good as unset
        monkeypatch.setenv(threads.VARIABLE, value)
        monkeypatch.setattr(threads._state, "n_threads", None)
        assert threads.n_threads() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork_the_child_computes():
    code = """
import os, warnings
warnings.simplefilter("ignore")
from npllama import threads
threads.set_threads(2)
threads.parallel(lambda i: None, 8)
pid = os.fork()
if pid == 0:
    done = []
    threads.parallel(done.append, 8)
    os._exit(0 if sorted(done) == list(range(8)) and threads.n_threads() == 2 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
