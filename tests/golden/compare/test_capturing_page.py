"""docs/capturing.md: its programs for ports of one's own record what compare() reads."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from npllama import checkpoint, load
from npllama.golden.compare import compare
from npllama.golden.precision import Precision
from npllama.golden.trace import write_trace

import tiny
from system import ROOT

_, OWN_PORT = (ROOT / "docs" / "capturing.md").read_text(encoding="utf-8").split("## Your own port\n")
TOKENS = [3, 17, 99, 54, 120, 7]
COMMANDS = {
    "c": ["cc", "-O1", "-Wall", "-Werror", "-o", "port", "port.c"],
    "js": ["node", "port.js"],
    "rust": ["rustc", "--edition", "2021", "-o", "port", "port.rust"],
}


@pytest.mark.parametrize("language", COMMANDS)
def test_a_port_of_ones_own(language, tmp_path):
    command = COMMANDS[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    config = tiny.config(rope_theta=500000.0)
    with checkpoint.create(tmp_path / "model", config, "float32", source={"kind": "test"}) as writer:
        for name, array in tiny.random_params(config, 3).items():
            writer.add(name, array)
    write_trace(load(tmp_path / "model"), TOKENS, tmp_path / "reference", precision=Precision("float64"))
    [program] = re.findall(rf"```{language}\n(.*?)```", OWN_PORT, re.DOTALL)
    (tmp_path / f"port.{language}").write_text(program)
    (tmp_path / "mine").mkdir()
    subprocess.run(command, cwd=tmp_path, check=True)
    if language != "js":
        subprocess.run(["./port"], cwd=tmp_path, check=True)
    found = compare(tmp_path / "reference", tmp_path / "mine", partial=True)
    assert found.equal, found.verdict
    assert [row.name for row in found.rows] == ["tok_embeddings"]
