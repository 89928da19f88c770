"""Run ranks that mpiexec has started: the command's text, its errors, and its end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from npllama.engine.ranks import mpi
from npllama.errors import NpllamaError

from commands import COMMAND
from system import hear_signals

GENERATE = [*COMMAND, "generate", "Once", "-n", "30"]
WITHIN = 120  # seconds after which something hangs


@pytest.fixture
def mpiexec() -> str:
    """Return the mpiexec of MPICH's package, next to this Python."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed: pip install '.[mpi]'")
    if (found := shutil.which("mpiexec", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("mpich is not installed: pip install '.[mpi]'")
    return found


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env={**os.environ, **environment})


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("mpich_shm_")}


@pytest.mark.parametrize("size", ["2", "4"])
def test_the_text_is_one_process_s_and_printed_once(mpiexec, size):
    """Use more ranks than this machine may have processors."""
    expected = run(*GENERATE)
    found = run(mpiexec, "-n", size, *GENERATE)
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout
    assert len(found.stderr.splitlines()) == len(expected.stderr.splitlines())
    assert found.stderr.rstrip().endswith(f"; {size} processes")


def test_open_mpi():
    """Make mpi4py load the library whose mpiexec has started it, also where MPICH is installed."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed: pip install '.[mpi]'")
    if (found := shutil.which("mpiexec.openmpi")) is None:
        pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
    for size in ("2", "4"):
        done = run(found, "--allow-run-as-root", "--oversubscribe", "-n", size, *GENERATE)
        assert done.returncode == 0, done.stderr
        assert done.stdout == run(*GENERATE).stdout
        assert f"; {size} processes" in done.stderr


def test_a_command_that_one_rank_does_is_done_once(mpiexec):
    found = run(mpiexec, "-n", "2", *COMMAND, "tokenize", "Once")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == run(*COMMAND, "tokenize", "Once").stdout


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["-m", "/nowhere"], "npllama generate: /nowhere: not found, expected a model directory"),
        (["--nothing"], "npllama generate: unrecognized arguments: --nothing (--help lists the options)"),
        (
            ["--processes", "2"],
            "npllama generate: mpiexec has started 2 processes: expected no --processes",
        ),
    ],
)
def test_bad_input_is_one_line(mpiexec, options, error):
    found = run(mpiexec, "-n", "2", *GENERATE, *options)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines() == [error]


def test_sums_gathered_parts_and_what_rank_0_has(mpiexec):
    """Gather shares that differ in size, one of them empty; sums have the same bits on all ranks."""
    code = """
    import os, numpy as np
    from npllama.engine.ranks import mpi
    group = mpi.world()
    x = np.random.default_rng(group.rank).standard_normal((3, 4, 5)).astype(np.float32)
    each = [np.random.default_rng(rank).standard_normal((3, 4, 5)).astype(np.float32) for rank in range(3)]
    total = group.total(x)
    assert np.abs(total - sum(each)).max() < 1e-5 and total.dtype == np.float32 and (x == each[group.rank]).all()
    assert len(set(group._comm.allgather(total.tobytes()))) == 1
    sizes = [5, 0, 2]
    found = group.gather(x[..., : sizes[group.rank]], sizes)
    assert (found == np.concatenate([y[..., :n] for y, n in zip(each, sizes)], axis=-1)).all()
    given = each[0].astype(np.float64) if group.rank == 0 else x
    assert (group.broadcast(given) == each[0]).all() and group.broadcast(given).dtype == np.float64
    os.write(1, b"held\\n")  # a line at once: three processes write
    """
    found = run(mpiexec, "-n", "3", sys.executable, "-c", textwrap.dedent(code))
    assert (found.returncode, found.stdout) == (0, "held\n" * 3), found.stderr


FAILS = """
import os, sys
from npllama.cli import main
from npllama.engine.ranks import following, leading, mpi
if mpi.launched()[0] == 1:
    {change}
sys.exit(main(["generate", "Once", "-n", "20", "--no-echo"]))
"""


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("leading.OPS.pop('FAST')", "npllama: rank 1: KeyError: 'FAST'"),
        ("following.load_part = lambda *args: 1 / 0", "npllama generate: rank 1: ZeroDivisionError: division by zero"),
        ("following.set_threads = lambda n: sys.exit(3)", "npllama: rank 1: SystemExit: 3"),
        ("following.set_threads = lambda n: os.kill(os.getpid(), 9)", ""),
    ],
)
def test_a_rank_that_fails_ends_all(mpiexec, change, error):
    """Fail in a pass, while loading, and by SIGKILL; only after SIGKILL may MPICH leave shared memory."""
    before = shared_memory()
    found = run(mpiexec, "-n", "2", sys.executable, "-c", FAILS.format(change=change))
    assert found.returncode == 2 if error else found.returncode
    assert found.stderr.splitlines() == ([error] if error else [])
    left = shared_memory() - before
    for name in left:  # by MPICH, of a rank that was killed
        Path("/dev/shm", name).unlink()
    assert not error or not left


IDLE = """
import os, sys
from npllama.cli import main
if os.environ["PMI_RANK"] == "1":
    print(os.getpid(), file=sys.stderr, flush=True)
sys.exit(main(["chat", "-n", "2"]))
"""


def test_a_rank_that_is_killed_during_a_wait_for_input_ends_all(mpiexec):
    before = shared_memory()
    command = [mpiexec, "-n", "2", sys.executable, "-c", IDLE]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write("Who art thou?\n")
    process.stdin.flush()
    assert process.stdout.readline()
    os.kill(int(process.stderr.readline()), signal.SIGKILL)
    assert process.wait(WITHIN)  # its input is still open
    process.communicate()
    for name in shared_memory() - before:  # MPICH leaves it, of a rank that was killed
        Path("/dev/shm", name).unlink()


def test_ctrl_c_ends_all_with_130(mpiexec):
    before = shared_memory()
    command = [mpiexec, "-n", "2", *COMMAND, "generate", "Once", "-n", "400", "--temperature", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_signals
    )
    process.stdout.read(10)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=WITHIN)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert not shared_memory() - before


# ------------------------------------------------------------------------------------------------------------- what is there


def test_an_mpiexec_of_another_mpi_is_refused(mpiexec):
    """Refuse an mpiexec whose processes don't find each other: each would compute everything alone."""
    told = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    told["MPI4PY_LIBMPI"] = str(Path(mpiexec).parents[1] / "lib" / "libmpi.so.12")
    found = run(*GENERATE, **told)
    assert (found.returncode, found.stdout) == (2, "")
    [line] = found.stderr.splitlines()
    assert line.startswith(
        "npllama: mpiexec started 2 processes, but by mpi4py each is alone: expected the mpiexec of its library, "
    )
    other = run(*GENERATE, **{**told, "OMPI_COMM_WORLD_RANK": "1"})
    assert (other.returncode, other.stdout, other.stderr) == (2, "", "")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, (1, 3)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"PMI_RANK": "x", "PMI_SIZE": "3"}, None),
    ],
)
def test_what_mpiexec_tells(monkeypatch, variables, expected):
    for names in mpi.VARIABLES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mpi.launched() == expected
    mpi.world.cache_clear()
    if expected is None:
        assert mpi.world() is None


class Machine:
    """Stand for mpi4py.MPI, of two ranks on one machine of eight processors, each pinned to `own` of them."""

    COMM_TYPE_SHARED = 0

    def __init__(self, *own: set[int]):
        self.COMM_WORLD, self.own = self, own

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 2

    def Split_type(self, kind: int) -> Machine:
        return self

    def allgather(self, found: set[int]) -> tuple[set[int], ...]:
        assert found == self.own[0]
        return self.own


@pytest.mark.parametrize(("together", "of_each"), [(None, 4), (8, 4), (100, 4), (5, 2), (2, 1), (1, 1)])
def test_the_threads_of_a_machine_are_those_of_all_its_ranks_together(together, of_each, monkeypatch):
    cpus = set(range(8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus, raising=False)
    assert mpi.World(Machine(cpus, cpus)).threads(together) == of_each
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert mpi.World(Machine({0, 1}, {2, 3})).threads(together) == min(of_each, 2)


def test_every_rank_is_told_the_number_of_threads(mpiexec, tmp_path):
    """Print each rank's number: --threads is that of the ranks of a machine together."""
    code = """
    import os, sys
    from npllama.engine import threads
    from npllama.engine.ranks import mpi
    from npllama.cli import main
    threads.available_cpus = lambda: 8
    told = []
    def give(self, together):
        told.append(together)
        return 1
    mpi.World.threads = give
    main(["logits", "--tokens", "1", "--out", sys.argv[1], "--threads", "5"])
    os.write(1, f"{told}\\n".encode())
    """
    found = run(mpiexec, "-n", "2", sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "logits.npy"))
    assert found.stdout == "[5]\n" * 2, found.stderr


def test_without_mpi4py_the_extra_is_named(monkeypatch):
    mpi.world.cache_clear()
    monkeypatch.setattr(mpi, "launched", lambda: (0, 2))
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        NpllamaError, match=r"2 processes were started by mpiexec, but mpi4py can't be used .*pip install 'npllama\[mpi\]'"
    ):
        mpi.world()
