"""The command line as a user meets it: output, errors, exit status."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import zipapp
from pathlib import Path

import numpy as np
import pytest

import npllama
from npllama import checkpoint, forward
from npllama.checkpoint import demo_path
from npllama.cli import main
from npllama.engine import threads

from conftest import ROOT, full_disk, hear_signals
from tiny import CONFIGS, random_params, relative_error

COMMAND = [sys.executable, "-m", "npllama"]


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, encoding="utf-8", **options)


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """A tiny model directory without a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "bare"
    with checkpoint.create(path, CONFIGS["grouped"], "float32", source={"kind": "test"}) as writer:
        for name, array in random_params(CONFIGS["grouped"], seed=1).items():
            writer.add(name, array)
    return path


@pytest.fixture
def copy_of_demo(tmp_path):
    shutil.copytree(demo_path(), tmp_path / "demo")
    return tmp_path / "demo"


def fails(capsys, *args: str, status: int = 2) -> str:
    """Run in this process, expect a failure, and return its one line."""
    assert main([str(arg) for arg in args]) == status
    out, err = capsys.readouterr()
    lines = (out + err).splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------- generate


def test_generate_prints_the_prompt_and_its_continuation():
    done = run("generate", "ROMEO:", "-n", "12")
    assert done.returncode == 0
    assert done.stdout.startswith("ROMEO:")
    assert len(done.stdout) > len("ROMEO:\n")
    assert "prefill" in done.stderr
    assert "decode 11 tokens at" in done.stderr
    assert "peak memory" in done.stderr
    bare = run("generate", "ROMEO:", "-n", "12", "--no-echo")
    assert "ROMEO:" + bare.stdout == done.stdout
    assert run("generate", "ROMEO:", "-n", "12").stdout == done.stdout
    assert run("generate", "ROMEO:", "-n", "12", "--seed", "5").stdout != done.stdout


def test_generate_from_nothing_starts_from_bos(capsys):
    model = npllama.load()
    assert main(["generate", "", "-n", "10", "--temperature", "0", "--top-p", "1"]) == 0
    ids = list(npllama.generate(model, [model.tokenizer.bos_id], max_tokens=10))
    assert capsys.readouterr().out == model.tokenizer.decode(ids) + "\n"


def test_recommended_settings_are_used_unless_overridden(capsys):
    model = npllama.load()
    recommended = model.generation
    assert recommended["temperature"] > 0
    ids = model.tokenizer.encode("KING", bos=True)
    for options, settings in (
        ([], {"temperature": recommended["temperature"], "top_p": recommended["top_p"]}),
        (["--temperature", "0"], {"temperature": 0.0, "top_p": recommended["top_p"]}),
        (["--temperature", "1.5", "--top-p", "0.5", "--top-k", "7", "--min-p", "0.01"],
         {"temperature": 1.5, "top_p": 0.5, "top_k": 7, "min_p": 0.01}),
    ):  # fmt: skip
        assert main(["generate", "KING", "-n", "20", "--no-echo", *options]) == 0
        expected = model.tokenizer.decode(list(npllama.generate(model, ids, 20, **settings)))
        assert capsys.readouterr().out == expected + "\n"


def test_stop_ends_before_the_text(capsys):
    assert main(["generate", "ROMEO:", "-n", "60", "--temperature", "0", "--no-echo"]) == 0
    text = capsys.readouterr().out
    stop = text[10:13]
    assert main(["generate", "ROMEO:", "-n", "60", "--temperature", "0", "--no-echo", "--stop", stop]) == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


def test_logprobs_print_a_line_per_token(capsys):
    assert main(["generate", "ROMEO:", "-n", "5", "--temperature", "0", "--logprobs", "3"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert len(row) == 3 + 3 * 3
        assert row[:3] == row[3:6]  # greedy takes the likeliest
        assert float(row[2]) >= float(row[8]) >= float(row[11])


def test_ids_work_without_a_tokenizer(bare, capsys):
    assert main(["generate", "--tokens", "1,2,3", "-m", str(bare), "-n", "4"]) == 0
    ids = [int(id) for id in capsys.readouterr().out.split(",")]
    model = npllama.load(bare)
    assert ids == [1, 2, 3, *npllama.generate(model, [1, 2, 3], max_tokens=4)]


ID_COMMANDS = {
    "generate": ["--tokens", "2000,450,25", "-n", "3"],
    "generate logprobs": ["--tokens", "2000,450,25", "-n", "3", "--logprobs", "1"],
    "walkthrough": ["--tokens", "2000,450,25"],
    "info": [],
    "verify": [],
    "logits": ["--tokens", "2000,450,25", "--out", "logits.npy"],
    "trace": ["--tokens", "2000,450,25", "--out", "trace"],
    "explain": ["--tokens", "2000,450,25", "-o", "page.html"],
    "tokenize": ["--decode", "450,25"],
    "golden": ["--out", "golden"],
}


@pytest.mark.parametrize("command", ID_COMMANDS)
def test_ids_need_no_package_for_text(command, tmp_path, capsys, monkeypatch):
    """Neither tiktoken nor regex: there is no wheel of tiktoken for 32 bits, s390x, ppc64le or riscv64."""
    if command == "explain":
        pytest.importorskip("bokeh", reason="bokeh is not installed")
    monkeypatch.chdir(tmp_path)
    name, arguments = command.split()[0], ID_COMMANDS[command]
    assert main([name, *arguments]) == 0
    expected = capsys.readouterr().out
    for file in ("trace", "golden"):
        shutil.rmtree(file, ignore_errors=True)
    for package in ("tiktoken", "regex"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main([name, *arguments]) == 0
    assert capsys.readouterr().out == expected


def test_text_without_a_package_for_it_is_one_line(capsys, monkeypatch):
    for package in ("tiktoken", "regex"):
        monkeypatch.setitem(sys.modules, package, None)
    line = fails(capsys, "generate", "ROMEO:")
    assert "tiktoken" in line
    assert line.endswith("pip install regex, or apt install python3-regex")
    assert "python3-regex" in fails(capsys, "walkthrough", "x", "--tokenizer")


@pytest.mark.parametrize("package", ["sentencepiece", "tokenizers"])
def test_ids_work_where_the_tokenizer_s_package_is_missing(package, tmp_path, capsys, monkeypatch):
    """The kinds that are run by a library alone: their ids have no text then, which is said."""
    files = {"sentencepiece": ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15"), "tokenizers": ("tokenizer.json", b"{}")}
    with checkpoint.create(tmp_path / "m", CONFIGS["grouped"], "float32", source={"kind": "test"}) as writer:
        for name, array in random_params(CONFIGS["grouped"], seed=1).items():
            writer.add(name, array)
        writer.add_file(*files[package])
    monkeypatch.setitem(sys.modules, package, None)
    model = ["-m", str(tmp_path / "m")]
    assert main(["generate", "--tokens", "1,2,3", "-n", "2", *model]) == 0
    out, err = capsys.readouterr()
    assert len(out.split(",")) == 5
    assert f"needs the package {package}: pip install" in err
    assert "no token ends the generation" in err
    assert main(["walkthrough", "--tokens", "1,2,3", *model]) == 0
    assert "came without a tokenizer" in " ".join(capsys.readouterr().out.split())
    assert main(["info", str(tmp_path / "m")]) == 0
    assert f"needs the package {package}" in capsys.readouterr().out
    assert f"needs the package {package}" in fails(capsys, "generate", "text", *model)


def test_text_without_a_tokenizer_is_refused(bare, capsys):
    for command in (["generate", "text"], ["chat"], ["logits", "--prompt", "text", "--out", "x.npy"], ["tokenize", "text"]):
        assert "has no tokenizer" in fails(capsys, *command, "-m", bare)


@pytest.fixture
def endless(copy_of_demo):
    """A command that goes on and on, as its model says id 0 for ever: should the reader stand still, it waits for him."""
    config = json.loads((copy_of_demo / "config.json").read_text())
    (copy_of_demo / "config.json").write_text(json.dumps(config | {"max_seq_len": 1 << 20}))
    norm = copy_of_demo / "norm.weight.npy"
    np.save(norm, np.zeros_like(np.load(norm)))
    return [*COMMAND, "generate", "ROMEO:", "-m", str(copy_of_demo), "-n", "1000000", "--temperature", "0"]


def test_tokens_stream_as_they_are_made(endless):
    """The first characters arrive long before the last: they are read while the process is still at work."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout.read(20).startswith(b"ROMEO:")
    assert process.poll() is None
    process.kill()
    process.wait()
    assert len(process.stdout.read()) < 8000  # what a buffer held back would be more
    process.stdout.close()


def test_ctrl_c_ends_cleanly(endless):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(endless, text=True, preexec_fn=hear_signals, **pipes)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert "Traceback" not in err
    assert "tokens/s" in err


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m npllama generate ROMEO: -n 300 | head -c 5", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "ROMEO"
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


# -------------------------------------------------------------------------------------------------------------------- chat


def test_chat_answers_a_line_each_and_keeps_the_conversation():
    done = run("chat", "--temperature", "0", "-n", "8", "--system", "Be brief.", input="Who art thou?\n\nAnd I?\n")
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 2  # two answers: an empty line asks nothing
    model = npllama.load()
    tokenizer = model.tokenizer
    messages = [{"role": "system", "content": "Be brief."}]
    expected = ""
    for question in ("Who art thou?", "And I?"):
        messages.append({"role": "user", "content": question})
        ids = npllama.chat.encode_llama3(tokenizer, messages)
        answer = tokenizer.decode(list(npllama.generate(model, ids, max_tokens=8)))
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert done.stdout == expected


def set_chat_format(path, name):
    values = json.loads((path / "config.json").read_text())
    values["generation"]["chat_format"] = name
    (path / "config.json").write_text(json.dumps(values))


def test_a_chat_format_that_is_guessed_is_said(copy_of_demo, capsys, monkeypatch):
    set_chat_format(copy_of_demo, None)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", "-m", str(copy_of_demo)]) == 0
    assert "comes without a chat format; llama3 is guessed from its tokenizer (--format)" in capsys.readouterr().err
    assert main(["chat", "-m", str(copy_of_demo), "--format", "llama3"]) == 0
    assert capsys.readouterr().err == ""


def test_a_chat_format_that_is_none_is_refused(copy_of_demo, capsys):
    set_chat_format(copy_of_demo, "telex")
    assert "config.json: chat_format is 'telex', expected llama3, llama2" in fails(capsys, "chat", "-m", copy_of_demo)


# ----------------------------------------------------------------------------------------------------- logits and tokenize


def test_logits_are_those_of_forward(bare, tmp_path):
    out = tmp_path / "logits.npy"
    assert main(["logits", "-m", str(bare), "--tokens", "5,6,7", "--out", str(out)]) == 0
    logits = np.load(out)
    assert logits.dtype == np.float32
    model = npllama.load(bare)
    assert relative_error(logits, forward(model.params, model.config, [5, 6, 7])) < 2e-6
    assert os.listdir(tmp_path) == ["logits.npy"]


def test_logits_leave_nothing_behind_when_they_fail(bare, tmp_path, capsys):
    line = fails(capsys, "logits", "-m", bare, "--tokens", "5,999", "--out", tmp_path / "x.npy")
    assert "token id 999 is outside the vocabulary: expected 0 to 130" in line
    assert os.listdir(tmp_path) == []


def test_tokenize_there_and_back(capsys):
    text = "To be, or not to be: that is the question.\n"
    assert main(["tokenize", text]) == 0
    line = capsys.readouterr().out.strip()
    assert main(["tokenize", "--decode", line]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert main(["tokenize", "--bos", "--pieces", "ROMEO"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == ["2000", "<|begin_of_text|>"]
    assert "".join(line.split()[1] for line in rest) == "ROMEO"


# -------------------------------------------------------------------------------------------------------- info and verify


def test_info_says_what_there_is(bare, capsys):
    assert main(["info", str(bare)]) == 0
    out = capsys.readouterr().out
    n = sum(x.size for x in random_params(CONFIGS["grouped"], 1).values())
    assert f"{n:,} parameters in 21 tensors" in out
    assert "n_kv_heads       2" in out
    assert "tokenizer: none" in out


def test_verify_tells_whole_from_altered(copy_of_demo, capsys):
    assert main(["verify", str(copy_of_demo)]) == 0
    capsys.readouterr()
    file = copy_of_demo / "norm.weight.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    line = fails(capsys, "verify", copy_of_demo, status=1)
    assert "norm.weight.npy is altered" in line


# ------------------------------------------------------------------------------------------------------------------ errors


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
        (["generate", "x", "--stop", "y", "--logprobs", "1"], "--stop ends a text, and with --logprobs there is none"),
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
    assert line.startswith(f"{' '.join(['npllama', *command])}: ")  # whose arguments they are
    assert "TRACE" not in line  # which `plot` takes and never needs
    assert line.endswith("(--help lists the options)")


@pytest.mark.skipif(os.name == "nt", reason="streams are closed as POSIX's shells do")
def test_closed_streams_are_no_traceback():
    def closed(*numbers: int, command: str = "generate ROMEO: -n 1") -> subprocess.CompletedProcess:
        return subprocess.run(
            [*COMMAND, *command.split()], capture_output=True, text=True, preexec_fn=lambda: [os.close(n) for n in numbers]
        )

    assert closed(0, command="chat").returncode == 0  # nothing is asked
    for streams in ((1,), (2,), (0, 1, 2)):
        done = closed(*streams)
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
    assert closed(2, command="generate x -m /nowhere").returncode == 2


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def environment(request):
    """Python holds output back, or it writes at once, and then takes a part for the whole."""
    return {**os.environ, "PYTHONUNBUFFERED": request.param}


PRINTING = [
    *["verify", "info", "models", "generate ROMEO: -n 2", "walkthrough ROMEO:", "walkthrough --tokenizer", "tokenize ROMEO:"],
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
    """Each command that prints to standard output."""
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
    """Run a command whose standard output nobody reads."""
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
    """Unbuffered, Python takes the 4,096 bytes that a disk had room for as all of it."""
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
    """After so many calls of Python functions: NumPy's import has most of them, then come the parser's."""
    command = [sys.executable, "-c", INTERRUPTED, str(moment), "generate", "x", "-n", "400", "--no-echo"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=hear_signals)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_prompt_from_standard_input(tmp_path):
    done = run("tokenize", "-", input="To be,\nor not")
    assert done.stdout == run("tokenize", "To be,\nor not").stdout
    told = run("generate", "-", "-n", "3", "--temperature", "0", input="To be,\nor not")
    assert told.stdout == run("generate", "To be,\nor not", "-n", "3", "--temperature", "0").stdout
    run("logits", "--prompt", "-", "--out", str(tmp_path / "x.npy"), input="To be")
    assert len(np.load(tmp_path / "x.npy")) == 1 + len(npllama.load().tokenizer.encode("To be"))
    done = subprocess.run([*COMMAND, "generate", "-"], input=b"caf\xe9", capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == "npllama generate: standard input: found the byte 0xe9 at 3, expected UTF-8\n"


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

    monkeypatch.setattr(npllama.cli, "load", no_memory)
    assert "Unable to allocate 99 GiB" in fails(capsys, "generate", "x")


@pytest.mark.parametrize(
    ("arguments", "variable", "message"),
    [
        (["--threads", "0"], None, "the number of threads is 0, expected 1 or more"),
        ([], "many", "NPLLAMA_NUM_THREADS is 'many', expected a whole number from 1"),
    ],
)
def test_a_number_of_threads_that_is_none(arguments, variable, message, capsys, monkeypatch):
    if variable:
        monkeypatch.setenv(threads.VARIABLE, variable)
    monkeypatch.setattr(threads._state, "n_threads", None)
    assert fails(capsys, "generate", "x", *arguments) == f"npllama generate: {message}"


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError("too deep"), type("PanicException", (BaseException,), {})("a\nb")]
)
def test_an_unforeseen_error_is_a_line_that_asks_to_report_it(error, capsys, monkeypatch):
    def fail(path):
        raise error

    monkeypatch.delenv("NPLLAMA_DEBUG", raising=False)
    monkeypatch.setattr(npllama.cli, "open_model", fail)
    text = " ".join(str(error).split())
    expected = f"npllama info: unforeseen {type(error).__name__}: {text}; please report it, with what NPLLAMA_DEBUG=1 shows"
    assert fails(capsys, "info") == expected
    monkeypatch.setenv("NPLLAMA_DEBUG", "1")
    assert main(["info"]) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", expected)


def test_the_system_s_errors_come_without_their_number(capsys, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(npllama.cli, "open_model", fail)
    assert fails(capsys, "info") == f"npllama info: {os.strerror(errno.EIO)}"


def test_an_id_that_the_model_has_and_its_tokenizer_not(copy_of_demo, capsys):
    larger = dataclasses.replace(npllama.load().config, vocab_size=2300)
    with checkpoint.create(copy_of_demo.parent / "larger", larger, "float32", source={"kind": "test"}) as writer:
        for name, array in random_params(larger, seed=1).items():
            writer.add(name, array)
        writer.add_file("tokenizer.model", copy_of_demo / "tokenizer.model")
    line = fails(capsys, "walkthrough", "--tokens", "1,2299", "-m", copy_of_demo.parent / "larger")
    assert "token id 2299 is outside the tokenizer's vocabulary: expected 0 to 2255" in line


def test_logits_that_are_nan_end_with_2_after_the_text(capsys, monkeypatch):
    model = npllama.load()
    model.params["norm.weight"] = np.full_like(model.params["norm.weight"], np.nan)
    monkeypatch.setattr(npllama.cli, "load", lambda *args: model)
    assert main(["generate", "ROMEO:"]) == 2
    out, err = capsys.readouterr()
    assert out == "ROMEO:\n"
    assert err.startswith("npllama generate: new token 1: of 2,256 logits 2,256 are NaN")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who art thou?\n"))
    assert main(["chat"]) == 2
    assert "npllama chat: new token 1: of 2,256 logits" in capsys.readouterr().err


def test_weights_that_stay_as_stored_are_said_before_the_text(capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 1000)
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 1000)
    assert main(["generate", "x", "-n", "1"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert "weights stay as stored" in first
    assert "from the disk again" in first
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 1 << 40)
    assert main(["generate", "x", "-n", "1"]) == 0
    assert "weights widened to float32" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- not installed


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    """The package alone in a zip that Python runs, as zipapp makes it."""
    folder = tmp_path_factory.mktemp("zipped")
    package = Path(npllama.__file__).parent
    shutil.copytree(package, folder / "app" / "npllama", ignore=shutil.ignore_patterns("__pycache__"))
    zipapp.create_archive(folder / "app", folder / "npllama.pyz", main="npllama.cli:main")
    shutil.rmtree(folder / "app")
    return folder


def run_zipped(folder: Path, *args: str) -> subprocess.CompletedProcess:
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0]); import npllama.cli; "
    code += "assert '.pyz' in npllama.__file__; sys.exit(npllama.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder / "npllama.pyz"), *args]
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder, env=environment)
    assert list(temporary.iterdir()) == []  # what was unpacked is gone again
    return done


@pytest.mark.parametrize("command", ["generate", "walkthrough", "info", "verify"])
def test_the_embedded_model_opens_from_a_zip(command, zipped):
    arguments = {"generate": ["ROMEO:", "-n", "5"], "walkthrough": ["Hello"], "info": [], "verify": []}[command]
    found, expected = run_zipped(zipped, command, *arguments), run(command, *arguments)
    assert found.returncode == 0, found.stderr
    if command in ("generate", "walkthrough"):
        assert found.stdout == expected.stdout
    else:
        assert len(found.stdout.splitlines()) == len(expected.stdout.splitlines())


def test_the_page_is_written_from_a_zip(zipped):
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    done = run_zipped(zipped, "explain", "Hello", "-o", "page.html")
    assert done.returncode == 0, done.stderr
    assert (zipped / "page.html").stat().st_size > 10_000


def test_a_copy_without_the_embedded_model_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    monkeypatch.setattr(checkpoint.importlib.resources, "files", lambda package: tmp_path)
    checkpoint._unpacked_demo.cache_clear()
    assert "the embedded model is missing from this copy of npllama: expected" in fails(capsys, "info")


@pytest.mark.parametrize("args", [["models"], ["fetch", "smollm2-135m"], ["convert", "a", "b"]], ids=lambda args: args[0])
def test_a_copied_checkout_says_what_it_lacks(args, bare, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NPLLAMA_HOME", str(tmp_path))
    shutil.copytree(bare, tmp_path / "models" / "mine")
    for name in [name for name in sys.modules if name.split(".")[0] == "npllama_convert"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "npllama_convert", None)
    assert main(args) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(
        f"npllama {args[0]}: needs the package npllama_convert, which installing npllama brings: pip install ."
    )
    assert ("mine" in out) == (args == ["models"])
