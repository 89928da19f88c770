"""A file that is written whole or not at all; folders are in test_checkpoint.py, with the model directory that they are for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from npllama import atomic

from conftest import hear_signals

posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and signals are POSIX's")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")
    with atomic.new_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert left_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_vanishes(tmp_path, error):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")

    def half() -> None:
        with atomic.new_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(atomic.FileError if isinstance(error, OSError) else type(error)) as raised:
        half()
    if isinstance(error, OSError):
        assert str(raised.value) == f"{path}: No space left on device"
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["x.npy"]


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, "", tmp_path / "missing" / "x"):
        with pytest.raises(atomic.FileError, match=r"is a folder, expected a file to write|missing/x: No such file"):
            atomic.write_file(path, b"x")
    assert left_in(tmp_path) == []


@posix
def test_a_link_stays_and_what_it_names_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("elsewhere")
    for name, real in (("link", "real"), ("dangling", "elsewhere")):
        atomic.write_file(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / real).read_bytes() == b"new"


@posix
def test_a_pipe_is_written_to_and_stays(tmp_path):
    """As a device is: `--out /dev/null` must not put a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    atomic.write_file(tmp_path / "pipe", b"new")
    reader.join(60)
    assert read == [b"new"]
    assert (tmp_path / "pipe").is_fifo()
    assert left_in(tmp_path) == ["pipe"]


WRITER = """
import sys, time
from npllama.atomic import new_file
with new_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("now", flush=True)
    time.sleep(60)
"""


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_killed_at_work(tmp_path, name):
    path = tmp_path / "x.npy"
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, preexec_fn=hear_signals, **pipes) as process:
        assert process.stdout.readline() == "now\n"
        atomic.write_file(path, b"ours")  # another run's file, at work, is left alone
        assert len(left_in(tmp_path)) == 2
        process.send_signal(getattr(signal, name))
        assert process.wait(60) != 0
    assert len(left_in(tmp_path)) == (2 if name == "SIGKILL" else 1)
    atomic.write_file(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert left_in(tmp_path) == ["x.npy"]
