"""Share work among threads: all of it is done, once; errors arrive; BLAS gets its threads back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from npllama.engine import threads

pytestmark = pytest.mark.usefixtures("threads_restored")
BLAS = ThreadpoolController().select(user_api="blas").lib_controllers


def blas_threads() -> list[int]:
    """Return how many threads each BLAS of this process has now."""
    return [library.get_num_threads() for library in BLAS]


def started_with(value: str, code: str) -> str:
    """Run code in a new process with this NPLLAMA_NUM_THREADS, which is read once; return its output."""
    command = [sys.executable, "-c", f"import os\nfrom npllama.engine import threads\n{code}"]
    environment = os.environ | {threads.VARIABLE: value}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 100])
def test_every_task_runs_once(n_threads, n):
    threads.set_threads(n_threads)
    done = []
    threads.parallel(done.append, n)
    assert sorted(done) == list(range(n))


def test_tasks_run_side_by_side():
    threads.set_threads(2)
    both = threading.Barrier(2, timeout=60)
    threads.parallel(lambda i: both.wait(), 2)  # a barrier of two is passed by two threads only


@pytest.mark.parametrize("bad", [0, 7, 63])
def test_an_exception_arrives_and_blas_has_its_threads_again(bad):
    threads.set_threads(2)
    before = blas_threads()
    inside = []

    def task(i: int) -> None:
        inside.append(max(blas_threads()))
        if i == bad:
            raise RuntimeError(f"task {i}")

    with pytest.raises(RuntimeError, match=f"task {bad}"):
        threads.parallel(task, 64)
    assert set(inside) == {1}
    assert blas_threads() == before
    threads.parallel(lambda i: None, 4)  # and the pool still works


@pytest.mark.parametrize("where", ["caller", "worker"])
def test_after_an_exception_nothing_more_is_begun(where):
    threads.set_threads(2)
    begun = []

    def task(i: int) -> None:
        begun.append(i)
        if (threading.current_thread() is threading.main_thread()) == (where == "caller"):
            raise RuntimeError
        time.sleep(0.001)

    with pytest.raises(RuntimeError):
        threads.parallel(task, 5000)
    assert len(begun) < 1000


def test_what_was_begun_has_ended_when_an_exception_arrives():
    threads.set_threads(2)
    both, ended = threading.Barrier(2, timeout=60), []

    def task(i: int) -> None:
        both.wait()
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError
        time.sleep(0.3)
        ended.append(i)

    with pytest.raises(RuntimeError):
        threads.parallel(task, 2)
    assert len(ended) == 1


@pytest.mark.parametrize("workers", ["waiting", "to be started"])
def test_an_interrupt_at_each_step_leaves_all_as_it_should_be(workers):
    """Restore in a thread's next region what the interrupted one could not.

    CPython checks for signals where a function begins, where a built-in one has returned, and where a loop begins again. A
    profile function is called at the first two, in every version. An exception of a trace function is no substitute: raised in
    a comprehension, CPython 3.12 and 3.13 leave the lock around it locked.
    """
    threads.set_threads(2)

    def interrupted_at(nth: int) -> bool:
        """Run a region whose nth step raises, as Ctrl-C does; return whether there were so many steps."""
        seen = 0

        def profile(frame, event, _):
            nonlocal seen
            if event in ("call", "c_return"):
                seen += 1
                if seen == nth:
                    raise KeyboardInterrupt

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            threads.parallel(lambda i: None, 4)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(before)
        return False

    nth = 1
    while interrupted_at(nth):
        done = []
        threads.parallel(done.append, 4)
        another = threading.Thread(target=threads.parallel, args=(done.append, 4), daemon=True)
        another.start()
        another.join(60)
        assert sorted(done) == sorted([0, 1, 2, 3] * 2), nth
        assert threads.n_threads() == 2, nth
        assert set(blas_threads()) == {2}, nth
        if workers == "to be started":
            threads.set_threads(1)
            threads.set_threads(2)
        nth += 1
    assert nth > 60


INTERRUPTED = """
import faulthandler, random, signal, time, numpy
faulthandler.dump_traceback_later(240, exit=True)  # if it hangs
from threadpoolctl import ThreadpoolController
from npllama.engine import threads
threads.set_threads(2)
libraries, chance = ThreadpoolController().select(user_api="blas").lib_controllers, random.Random(1)
assert libraries  # else nothing would be shared
threads.parallel(lambda i: None, 2)
signal.signal(signal.SIGALRM, signal.default_int_handler)
n, end = 0, time.monotonic() + 5
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + chance.random() * 1e-3)
        while True:
            threads.parallel(lambda i: sum(range(100)), 4)
    except KeyboardInterrupt:
        n += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    done = []
    threads.parallel(done.append, 4)
    assert sorted(done) == [0, 1, 2, 3]
    assert [library.get_num_threads() for library in libraries] == [2] * len(libraries)
    assert threads.n_threads() == 2
    if chance.random() < 0.5:  # the next region starts a worker
        threads.set_threads(1)
        threads.set_threads(2)
assert n > 10, n  # thousands on an idle machine
print(n, "interrupts")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers' signals on this system")
def test_an_interrupt_at_any_moment():
    """Stop an answer by Ctrl-C: the next region finds all settings restored, and the process ends."""
    subprocess.run([sys.executable, "-c", INTERRUPTED], check=True, timeout=300)


def test_the_number_may_change_while_another_thread_computes():
    threads.set_threads(2)
    inside, go = threading.Event(), threading.Event()

    def task(i: int) -> None:
        inside.set()
        assert go.wait(60)

    caller = threading.Thread(target=threads.parallel, args=(task, 2))
    caller.start()
    assert inside.wait(60)
    threads.set_threads(3)
    assert set(blas_threads()) == {1}
    go.set()
    caller.join()
    assert set(blas_threads()) == {3}


def test_a_limit_that_others_set_stays():
    threads.set_threads(2)
    with threadpool_limits(1, user_api="blas"):
        threads.parallel(lambda i: None, 4)
        assert set(blas_threads()) == {1}


def test_fewer_threads_end_the_others():
    code = """
import _thread, threading, time, numpy
others, all_of_them = _thread._count(), threading.Barrier(4, timeout=60)
threads.parallel(lambda i: all_of_them.wait(), 4)  # a thread is counted once it runs
assert _thread._count() - others == 3
threads.set_threads(2)
end = time.monotonic() + 60
while _thread._count() - others > 1:
    assert time.monotonic() < end
    time.sleep(0.01)
threads.parallel(lambda i: None, 8)
print(_thread._count() - others)
"""
    assert started_with("4", code) == "1"


def test_what_was_computed_with_is_not_kept():
    """Release the arrays of a worker's last task while it waits."""
    threads.set_threads(2)
    both, array = threading.Barrier(2, timeout=60), np.zeros(10)
    gone = weakref.ref(array)
    threads.parallel(lambda i, array=array: both.wait(), 2)
    del array
    end = time.monotonic() + 60
    while gone() is not None:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_callers_at_once_leave_blas_as_it_was():
    threads.set_threads(2)
    before = blas_threads()

    inside = set()

    def caller() -> None:
        for _ in range(200):
            threads.parallel(lambda i: inside.add(max(blas_threads())), 3)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert inside == {1}
    assert blas_threads() == before


def test_a_task_shares_its_own_work_with_nobody():
    """Run nested tasks in their own thread: it would otherwise wait for a thread that waits for it."""
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


def test_set_threads_is_blas_threads_too():
    threads.set_threads(1)
    assert set(blas_threads()) == {1}


def test_a_bad_variable_is_one_line():
    code = f"""
for os.environ["{threads.VARIABLE}"] in ("0", "-1", "two", " ", "1.5", "²"):
    try:
        print(threads.n_threads())
    except ValueError as error:
        print(ascii(str(error)))
"""
    lines = started_with("0", code).splitlines()
    assert len(lines) == 6
    assert all("number" in line and "expected" in line for line in lines), lines


def test_the_processors_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert threads.available_cpus() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.available_cpus() == os.cpu_count()


def test_the_variable_is_taken():
    for value, expected in (("3", 3), ("", threads.available_cpus())):  # empty is as good as unset
        assert started_with(value, "print(threads.n_threads())") == str(expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork_the_child_computes():
    code = """
import os, signal, warnings, numpy
warnings.simplefilter("ignore")
from npllama.engine import threads
threads.set_threads(3)
threads.parallel(lambda i: None, 8)
pid = os.fork()
if pid == 0:
    signal.alarm(100)  # should it wait for a thread that isn't there
    done = []
    threads.parallel(done.append, 8)
    os._exit(0 if sorted(done) == list(range(8)) and threads.n_threads() == 3 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
