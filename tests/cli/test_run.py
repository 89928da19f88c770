"""Test npllama run, and the error for a checkpoint where a model directory is expected."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from npllama.checkpoint import open_model
from npllama.cli import main

import foreign
import tiny
from commands import fails, run

CONFIG = tiny.config(n_layers=1, vocab_size=330)


@pytest.fixture
def src(tmp_path, tiny_llama2_json_file) -> Path:
    """Write a Hugging Face folder."""
    folder = foreign.write_hf(tmp_path / "my model", CONFIG, tiny.random_params(CONFIG, seed=5))
    shutil.copy(tiny_llama2_json_file, folder)
    return folder


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NPLLAMA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def asked(src: object) -> str:
    """Ask the model of a source one question, and return standard error."""
    done = run("run", str(src), "-n", "4", "--temperature", "0", "--format", "llama2", input="Once\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stderr


def test_a_checkpoint_is_converted_once_and_again_when_it_has_changed(src, models):
    assert "npllama chat -m my-model-" in asked(src)
    (model,) = models.iterdir()
    first = open_model(model).manifest
    assert "npllama chat -m" not in asked(src)
    assert open_model(model).manifest == first
    foreign.write_hf(src, CONFIG, tiny.random_params(CONFIG, seed=6))
    os.utime(src / "model.safetensors", ns=(1, 1))
    assert "has changed since it was converted" in asked(src)
    assert open_model(model).manifest["tensors"] != first["tensors"]
    assert "npllama chat -m" not in asked(model)  # as a path
    assert "npllama chat -m" not in asked(model.name)  # and as a name


def test_nothing_of_the_user_s_is_replaced(src, models, capsys):
    asked(src)
    (model,) = models.iterdir()
    (model / "notes.txt").write_text("precious")
    os.utime(src / "model.safetensors", ns=(1, 1))
    assert main(["run", str(src)]) == 2
    assert "is not replaced: " in capsys.readouterr().err
    assert (model / "notes.txt").read_text() == "precious"


def test_what_is_no_checkpoint_is_one_line(tmp_path, models, capsys):
    assert "nowhere: not found, expected a folder of Meta's or Hugging Face's" in fails(capsys, "run", tmp_path / "nowhere")
    assert not models.exists()


@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_checkpoint_in_a_model_s_place_prints_the_line_that_converts_it(src, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    gguf = foreign.write_gguf(tmp_path / "it's.gguf", CONFIG, tiny.random_params(CONFIG, seed=5))
    for i, path in enumerate((gguf, src)):
        arguments = ["generate", "Once", "-m"] if command == "generate" else ["info"]
        line = fails(capsys, *arguments, path)
        assert f"{path} is a checkpoint, expected a model directory: npllama convert " in line
        typed = shlex.split(line[line.index("npllama convert ") :])
        assert typed[:3] == ["npllama", "convert", str(path)]
        assert main(typed[1:]) == 0
        assert open_model(tmp_path / typed[3]).config == CONFIG, i
        capsys.readouterr()
