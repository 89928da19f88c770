"""Test the command line as a whole: its commands, and errors on one line with their exit status."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from npllama.cli import COMMANDS, build_parser, info, main, options

from commands import fails, run
from system import ROOT, hear_signals

SHARED = {"__init__", "options", "console", "chat_loop"}


def test_each_file_is_a_command_of_its_name(capsys):
    files = {path.stem for path in (ROOT / "npllama" / "cli").glob("*.py")} - SHARED
    assert sorted(command.__name__ for command in COMMANDS) == sorted(f"npllama.cli.{name}" for name in files)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    shown = re.findall(r"^    ([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(shown) == sorted(name.replace("_", "-") for name in files)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_each_command_has_a_page_of_help(command, capsys):
    name = command.__name__.rpartition(".")[2].replace("_", "-")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: npllama {name} ")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "x", "-m", "/nowhere"], "/nowhere: not found, expected a model directory"),
        (["generate"], "expected a prompt, or --tokens"),
        (["generate", "x", "--tokens", "1"], "expected a prompt, or --tokens"),
        (["generate", "--tokens", "2256"], "token id 2256 is outside the vocabulary: expected 0 to 2255"),
        (["generate", "--tokens", ",".join(["1"] * 513)], "the prompt has 513 tokens, the model's context holds 512"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0, expected 0 or more"),
        (["generate", "x", "--top-p", "0"], "top_p is 0.0"),
        (["generate", "x", "-n", "-3"], "-n is -3, expected 0 or more"),
        (["tokenize"], "expected a text, or --decode"),
        (["tokenize", "--decode", "99999"], "token id 99999 is outside the tokenizer's vocabulary: expected 0 to 2255"),
        (["tokenize", "x", "-m", "/nowhere/tokenizer.model"], "/nowhere/tokenizer.model"),
        (["verify", "/nowhere"], "/nowhere: not found"),
        (["info", "/nowhere"], "/nowhere: not found"),
        *[([*command, ""], "the model's name is empty") for command in (["info"], ["verify"], ["generate", "x", "-m"])],
        (
            ["generate", "x", "--stop", "y", "--logprobs", "1"],
            "--stop needs text, but --logprobs prints none: expected --json too",
        ),
        (["generate", "x", "--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["perplexity", "/nowhere"], "npllama perplexity: /nowhere: No such file or directory"),
        (["logits", "--tokens", "1", "--out", "/nowhere/x.npy"], "/nowhere/x.npy: No such file or directory"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_use_gets_one_line_and_status_2(args, words, capsys):
    assert words in fails(capsys, *args)


@pytest.mark.parametrize(
    "args",
    [
        *[["generate", "x", "--tokens", "1,x"], ["generate", "--tokens", "1,-2"], ["generate", "x", "--stop", ""]],
        *[["generate", "x", "--logprobs", "-1"], ["generate", "--tokens", "1,99999999999999999999"], ["nonsense"], []],
        *[["info", "--nonsense"], ["exercise", "start", "x", "--nonsense"], ["generate", "x", "y"], ["--nonsense", "info"]],
        *[["plot"], ["plot", "nonsense"]],
    ],
    ids=str,
)
def test_bad_arguments_get_one_line_and_status_2(args):
    done = run(*args)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    command = itertools.takewhile(("generate", "info", "plot", "exercise", "start").__contains__, args)
    assert line.startswith(f"{' '.join(['npllama', *command])}: ")  # names the subcommand
    assert "TRACE" not in line  # `plot`'s optional argument
    assert line.endswith("(--help lists the options)")


INTERRUPTED = """
import os, runpy, signal, sys
moment, n, started = int(sys.argv.pop(1)), 0, False
def watch(frame, event, argument):
    global n, started
    if event == "call":
        started = started or frame.f_code.co_filename.endswith("__main__.py") and frame.f_code.co_name == "main"
        n += started
        if n == moment + 3:  # once it listens: getsignal() and signal() are Python functions
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)
sys.setprofile(watch)
runpy.run_module("npllama", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("moment", [10, 100, 1_000, 3_000, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000])
def test_ctrl_c_at_any_moment_of_the_start(moment):
    """Interrupt after some number of Python calls: during NumPy's import, which makes most of them, or in the parser."""
    command = [sys.executable, "-c", INTERRUPTED, str(moment), "generate", "x", "-n", "400", "--no-echo"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=hear_signals)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def _missing(path):
    (path / "layers.3.attention.wk.weight.npy").unlink()
    return "layers.3.attention.wk.weight.npy is missing"


def _truncated(path):
    file = path / "tok_embeddings.weight.npy"
    os.truncate(file, 1000)
    return "tok_embeddings.weight.npy is 1,000 bytes"


def _config(path):
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "n_kv_heads": 5}))
    return "n_heads 6 is not a multiple of n_kv_heads 5"


def _no_json(path):
    (path / "config.json").write_text("{")
    return "config.json is not JSON"


def _tokenizer(path):
    (path / "tokenizer.model").write_text("<html>")
    return "tokenizer.model"


@pytest.mark.parametrize("damage", [_missing, _truncated, _config, _no_json, _tokenizer])
def test_a_damaged_model_directory_gets_one_line(damage, copy_of_demo, capsys):
    words = damage(copy_of_demo)
    assert words in fails(capsys, "generate", "x", "-m", copy_of_demo)


def test_memory_is_a_line_not_a_traceback(capsys, monkeypatch):
    def no_memory(*args):
        raise MemoryError("Unable to allocate 99 GiB")

    monkeypatch.setattr(options, "load", no_memory)
    assert "Unable to allocate 99 GiB" in fails(capsys, "generate", "x")


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError("too deep"), type("PanicException", (BaseException,), {})("a\nb")]
)
def test_an_unforeseen_error_is_a_line_that_asks_to_report_it(error, capsys, monkeypatch):
    def fail(path):
        raise error

    monkeypatch.delenv("NPLLAMA_DEBUG", raising=False)
    monkeypatch.setattr(info, "open_model", fail)
    text = " ".join(str(error).split())
    expected = f"npllama info: unforeseen {type(error).__name__}: {text}; please report it, with the output of NPLLAMA_DEBUG=1"
    assert fails(capsys, "info") == expected
    monkeypatch.setenv("NPLLAMA_DEBUG", "1")
    assert main(["info"]) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", expected)


def test_the_system_s_errors_come_without_their_number(capsys, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(info, "open_model", fail)
    assert fails(capsys, "info") == f"npllama info: {os.strerror(errno.EIO)}"
