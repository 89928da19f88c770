"""docs/finding-a-bug.md is true: its commands print what it shows, and the C port in it is right but for one mistake.

README's two lines of a verdict are as true.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npllama.checkpoint import create, load
from npllama.cli import main
from npllama.golden.compare import compare
from npllama.golden.compare.noise import LIMITS
from npllama.golden.mistakes import Port
from npllama.golden.precision import Precision, round_bfloat16
from npllama.golden.trace import write_trace

import tiny
from system import ROOT

PORT = ROOT / "tests" / "ports" / "llama.c"
PAGE = ROOT / "docs" / "finding-a-bug.md"


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("cc")
    if not found:
        pytest.skip("no C compiler is installed")
    return found


def run_port(compiler: str, flags: list[str], model: Path, tokens: np.ndarray, folder: Path) -> Path:
    """Compile the port, run it, and return the folder of its activations."""
    program, out = folder / "llama", folder / "mine"
    out.mkdir()
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-Werror", *flags, "-o", program, PORT, "-lm"], check=True)
    subprocess.run([program, model, out, *map(str, tokens)], check=True)
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Write a tiny model directory in bfloat16, with grouped queries, untied embeddings and another θ than Llama 2's."""
    config = tiny.config(rope_theta=500000.0, rope_scaling=None)
    path = tmp_path_factory.mktemp("port") / "model"
    with create(path, config, "bfloat16", {"kind": "test"}) as writer:
        for name, x in tiny.random_params(config, 1).items():
            writer.add(name, round_bfloat16(x))
    return path


@pytest.mark.parametrize(("flags", "equal"), [([], False), (["-DFIXED"], True)])
def test_the_port_in_c(compiler, model, flags, equal, tmp_path):
    tokens = tiny.random_tokens(tiny.config(), 3, 20)
    reference = write_trace(load(model), tokens, tmp_path / "reference", 0, Precision("float64")).path
    found = compare(reference, run_port(compiler, flags, model, tokens, tmp_path))
    assert found.equal == equal, found.verdict
    if equal:
        worst = max(judged.ratio for row in found.rows for judged in (row.judged, row.local))
        assert worst < LIMITS["float32"].one / 2, "plain loops in C are no mistake, by a margin"
    else:
        assert found.verdict.startswith("first divergence: layers.0.attention.q_rope (relative error ")
        assert found.hints == ["wrong RoPE θ: the angles are those of θ = 10000, and 500000 was expected"]
        assert {name.split(".", 2)[2] for name in found.wrong_by_themselves} == {"attention.q_rope", "attention.k_rope"}


def blocks() -> list[tuple[str, str]]:
    """Return the page's commands and the output that it states for each."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def without_numbers(text: str) -> list[str]:
    """Remove measured numbers, which differ between machines, from the lines, and collapse the space around them."""
    text = re.sub(r"\([\w.]+; the limit", "(NAME; the limit", text)  # which is closest to the limit differs as well
    text = re.sub(r"(?<![\w.])-?\d+(\.\d+)?(e[+-]?\d+)?%?(?![\w.]*[a-z_])", "#", text)
    return [re.sub(r"\s+", " ", line).strip() for line in text.strip().splitlines()]


def test_numbers_are_struck_out_but_names_are_not():
    assert without_numbers("layers.0.attention.q  7.8e-07 1e+07 93.3% ok") == ["layers.0.attention.q # # # ok"]


def test_the_page_shows_what_its_commands_print(compiler, tmp_path):
    for name in ("tests", "npllama"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "npllama"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m npllama "$@"\n')
    program.chmod(0o755)
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONIOENCODING": "utf-8",
    }
    commands = blocks()
    assert sum("npllama compare" in command for command, _ in commands) >= 2
    for command, expected in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
        )
        assert done.returncode == ("compare" in command and "first divergence" in expected), done.stderr
        assert without_numbers(done.stdout + done.stderr) == without_numbers(expected), command
        for line in expected.splitlines():
            if line.startswith("hint: "):
                assert line in done.stdout.splitlines()


def test_readme_shows_the_verdict_on_a_port_that_rotates_halves(tmp_path, capsys):
    model = load()
    tokens = model.tokenizer.encode("Two households, both alike in dignity", bos=True)
    write_trace(model, tokens, tmp_path / "reference", 0, Precision("float64"))
    port = Port("half_split")
    write_trace(model, tokens, tmp_path / "mine", 0, port)
    assert main(["compare", str(tmp_path / "reference"), str(tmp_path / "mine")]) == 1
    printed = capsys.readouterr().out.splitlines()[:2]
    (block,) = re.findall(r"```\n(first divergence: .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert without_numbers("\n".join(printed)) == without_numbers(block)
    assert printed[1] == block.splitlines()[1]
