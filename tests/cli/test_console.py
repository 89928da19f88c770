"""Test standard streams that are closed, full or unread: the exit status is right."""

from __future__ import annotations

import io
import os
import shutil
import subprocess

import numpy as np
import pytest

import npllama
from npllama.cli import main
from npllama.cli.console import error_text, rate

from commands import COMMAND
from system import ROOT, full_disk


@pytest.mark.skipif(os.name == "nt", reason="streams are closed as POSIX's shells do")
def test_closed_streams_are_no_traceback():
    def closed(*numbers: int, command: str = "generate ROMEO: -n 1") -> subprocess.CompletedProcess:
        return subprocess.run(
            [*COMMAND, *command.split()], capture_output=True, text=True, preexec_fn=lambda: [os.close(n) for n in numbers]
        )

    assert closed(0, command="chat").returncode == 0  # standard input is empty
    for streams in ((1,), (2,), (0, 1, 2)):
        done = closed(*streams)
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
    assert closed(2, command="generate x -m /nowhere").returncode == 2


@pytest.fixture(params=["", pytest.param("1", marks=pytest.mark.once)], ids=["buffered", "unbuffered"])
def environment(request):
    """Test buffered output and unbuffered output (-u), for which Python takes a partial write for a whole one."""
    return {**os.environ, "PYTHONUNBUFFERED": request.param}


PRINTING = [
    *["verify", "info", "models", "generate ROMEO: -n 2", "walkthrough ROMEO:", "walkthrough-tokenizer", "tokenize ROMEO:"],
    *["exercise list", "--help", "generate --help", "--version", "perplexity LICENSE --context 16", "chat -n 2"],
    *["generate ROMEO: -n 2 --logprobs 2", "generate --tokens 1,2 -n 2", "compare TRACE TRACE --all"],
]


@pytest.fixture(scope="session")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "trace"
    npllama.write_trace(npllama.load(), [1, 2, 3], path)
    return path


@pytest.fixture(params=PRINTING)
def printing(request, trace):
    """Test each command that prints to standard output."""
    return [*COMMAND, *request.param.replace("TRACE", str(trace)).replace("LICENSE", str(ROOT / "LICENSE")).split()]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error(printing, environment):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(printing, stdout=full, stderr=subprocess.PIPE, env=environment, input=b"Who?\n")
    assert done.returncode == 2
    *_, line = done.stderr.decode().splitlines()
    assert line.startswith("npllama")
    assert line.endswith(": standard output: No space left on device")
    assert b"Exception" not in done.stderr


def to_nobody(command: list[str], **options) -> tuple[int, str]:
    """Run a command whose standard output has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, input=b"Who?\n", **options)
    os.close(writer)
    return done.returncode, done.stderr.decode()


@pytest.mark.skipif(os.name == "nt", reason="pipes are closed as POSIX's shells do")
def test_a_reader_that_has_gone_is_no_error(printing, environment):
    status, err = to_nobody(printing, env=environment)
    assert status == 0
    assert "Exception" not in err
    assert "Broken" not in err


@pytest.mark.skipif(os.name == "nt", reason="pipes are closed as POSIX's shells do")
def test_a_verdict_is_the_status_even_if_nobody_reads_it(environment, trace, copy_of_demo, tmp_path):
    shutil.copytree(trace, tmp_path / "other")
    (copy_of_demo / "norm.weight.npy").write_bytes(b"")
    assert main(["exercise", "start", str(tmp_path / "exercises")]) == 0
    np.save(tmp_path / "other" / "norm.npy", np.zeros((3, 192), np.float32))
    for command in (
        ["verify", copy_of_demo],
        ["exercise", "check", tmp_path / "exercises"],
        ["compare", trace, tmp_path / "other", "--all", "--atol", "0"],
    ):
        status, err = to_nobody([*COMMAND, *map(str, command)], env=environment)
        assert (status, err) == (1, "")


def test_a_write_that_is_cut_short_is_an_error(environment, tmp_path):
    """Test a disk with room for 4,096 bytes: unbuffered, Python takes these for the whole output."""
    with open(tmp_path / "x", "wb") as out, full_disk(4096):
        done = subprocess.run([*COMMAND, "walkthrough", "ROMEO:"], stdout=out, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 2
    assert done.stderr == b"npllama walkthrough: standard output: File too large\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_statistics_that_are_lost_are_an_error(environment):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "generate", "x", "-n", "1"], stdout=subprocess.PIPE, stderr=full, env=environment)
    assert done.returncode == 2
    assert done.stdout.startswith(b"x")


@pytest.mark.skipif(os.name == "nt", reason="/dev/stdout is POSIX's")
def test_a_file_may_be_standard_output():
    done = subprocess.run([*COMMAND, "logits", "--tokens", "1,2", "--out", "/dev/stdout"], stdout=subprocess.PIPE)
    assert np.load(io.BytesIO(done.stdout)).shape == (2, 2256)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(2, "No such file or directory", "m/config.json"), "m/config.json: No such file or directory"),
        (OSError(27, "File too large"), "File too large"),
        (ValueError("two\n  lines"), "two lines"),
        (MemoryError(), "MemoryError"),
        (KeyError("x"), "unforeseen KeyError: 'x'; please report it, with the output of NPLLAMA_DEBUG=1"),
    ],
)
def test_an_error_is_one_line(error, expected):
    assert error_text(error) == expected


def test_no_time_at_all_is_a_rate_too():
    assert rate(3, 2.0) == "1.5 tokens/s"
    assert rate(1, 0.0).endswith(" tokens/s")
