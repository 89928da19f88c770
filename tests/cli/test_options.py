"""Test the options that commands share: prompts of text or ids, with and without a tokenizer; threads; dtype."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import npllama
from npllama import checkpoint
from npllama.checkpoint import reading
from npllama.cli import main, options
from npllama.engine import threads

from commands import COMMAND, fails, run
from system import ROOT
from tiny import CONFIGS, random_params

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
    """Test without tiktoken and regex: tiktoken has no wheel for 32 bits, s390x, ppc64le or riscv64."""
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
    """Test tokenizers that need a library: without it ids have no text, and a line says so."""
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
    assert "no stop token ends the generation" in err
    assert main(["walkthrough", "--tokens", "1,2,3", *model]) == 0
    assert "came without a tokenizer" in " ".join(capsys.readouterr().out.split())
    assert main(["info", str(tmp_path / "m")]) == 0
    assert f"needs the package {package}" in capsys.readouterr().out
    assert f"needs the package {package}" in fails(capsys, "generate", "text", *model)


def test_text_without_a_tokenizer_is_refused(bare, capsys):
    for command in (["generate", "text"], ["chat"], ["logits", "--prompt", "text", "--out", "x.npy"], ["tokenize", "text"]):
        assert "has no tokenizer" in fails(capsys, *command, "-m", bare)


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


def test_a_row_of_the_model_without_a_token(copy_of_demo, capsys):
    larger = dataclasses.replace(npllama.load().config, vocab_size=2300)
    with checkpoint.create(copy_of_demo.parent / "larger", larger, "float32", source={"kind": "test"}) as writer:
        for name, array in random_params(larger, seed=1).items():
            writer.add(name, array)
        writer.add_file("tokenizer.model", copy_of_demo / "tokenizer.model")
    assert main(["walkthrough", "--tokens", "1,2299", "-m", str(copy_of_demo.parent / "larger")]) == 0
    assert "2299" in capsys.readouterr().out
    line = fails(capsys, "walkthrough", "--tokens", "1,2300", "-m", copy_of_demo.parent / "larger")
    assert line == "npllama walkthrough: token id 2300 is outside the vocabulary: expected 0 to 2299"


def test_a_number_of_threads_that_is_none(capsys):
    line = fails(capsys, "generate", "x", "--threads", "0")
    assert line == "npllama generate: the number of threads is 0, expected 1 or more"
    # In a separate process, as the variable is read once per process.
    process = run("generate", "x", env={**os.environ, threads.VARIABLE: "many"})
    assert process.returncode == 2
    assert process.stderr == "npllama generate: NPLLAMA_NUM_THREADS is 'many', expected a whole number from 1\n"


def test_weights_that_stay_as_stored_are_said_before_the_text(capsys, monkeypatch):
    monkeypatch.setattr(reading, "available_memory", lambda: 1000)
    monkeypatch.setattr(reading, "free_memory", lambda: 1000)
    assert main(["generate", "x", "-n", "1"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert "weights stay as stored" in first
    assert "from the disk again" in first
    monkeypatch.setattr(reading, "available_memory", lambda: 1 << 40)
    assert main(["generate", "x", "-n", "1"]) == 0
    assert "weights widened to float32" in capsys.readouterr().err


# The other arguments that each command needs before it opens its model.
WITH_PROCESSES = {
    "generate": ["x"],
    "chat": [],
    "serve": ["--port", "0"],
    "logits": ["--tokens", "1,2", "--out", "logits.npy"],
    "trace": ["--tokens", "1,2", "--out", "trace"],
    "golden": ["--tokens", "1,2", "--out", "bundle"],
    "compare": ["logits.npz", "logits.npz", "-m", "model"],
    "perplexity": ["text.txt"],
}


def test_every_command_with_processes_is_tried():
    found = {path.stem for path in (ROOT / "npllama" / "cli").glob("*.py") if "add_processes_option(p)" in path.read_text()}
    assert found == WITH_PROCESSES.keys()


@pytest.mark.parametrize("command", WITH_PROCESSES)
def test_processes_reach_the_model(command, monkeypatch, tmp_path, capsys):
    if command == "serve":
        pytest.importorskip("uvicorn", reason="uvicorn is not installed")
        pytest.importorskip("starlette", reason="starlette is not installed")

    def load(path, dtype, processes):
        raise ValueError(f"the model was to have {processes} processes")

    monkeypatch.setattr(options, "load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    np.savez("logits.npz", logits=np.zeros((2, 3), np.float32))
    line = fails(capsys, command, *WITH_PROCESSES[command], "--processes", "3")
    assert line == f"npllama {command}: the model was to have 3 processes"


@pytest.mark.parametrize(
    ("name", "dtype", "memory", "said"),
    [
        ("packed", "stored", 1 << 40, "--processes auto: 3, one per core, as the weights stay packed"),
        ("packed", "auto", 0, "--processes auto: 3, one per core, as the weights stay packed"),
        ("packed", "auto", 1 << 40, "--processes auto: 1, as the weights are widened, and threads compute dense ones"),
        ("packed", "float32", 0, "--processes auto: 1, as the weights are widened, and threads compute dense ones"),
        ("dense", "stored", 1 << 40, "--processes auto: 1, as the weights are not packed"),
    ],
)
def test_auto_takes_a_process_per_core_for_packed_weights(name, dtype, memory, said, monkeypatch, tmp_path, capsys):
    """Announce the choice; it depends on the weights as they are computed with, and on the number of threads."""
    config, storage = CONFIGS["grouped"], {"packed": "bfloat16", "dense": "float32"}[name]
    params = random_params(config, 1)
    with checkpoint.create(tmp_path / "m", config, dict.fromkeys(params, storage), {"kind": "test"}) as writer:
        for key, array in params.items():
            writer.add(key, array)
    asked = []

    def load(path, dtype, processes):
        asked.append(processes)
        raise ValueError("far enough")

    monkeypatch.setattr(options, "load", load)
    monkeypatch.setattr(reading, "available_memory", lambda: memory)
    monkeypatch.setattr(threads, "n_threads", lambda: 3)
    command = ["logits", "-m", str(tmp_path / "m"), "--tokens", "1,2", "--out", str(tmp_path / "x.npy"), "--dtype", dtype]
    assert main([*command, "--processes", "auto"]) == 2
    assert capsys.readouterr().err.splitlines() == [said, "npllama logits: far enough"]
    assert asked == [int(said.split()[2][0])]


def test_a_number_of_processes_is_a_number_or_auto(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "x", "--processes", "all"])
    assert end.value.code == 2
    assert "'all' is not a number of processes, expected one or auto" in capsys.readouterr().err
