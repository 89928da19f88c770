"""Test npllama conformance: its output, and its exit status."""

from __future__ import annotations

import pytest

from npllama.cli import main
from npllama.golden.conformance.cases import cases

from commands import fails

RIGHT = "import numpy as np\nfrom npllama.ops import softmax\n"


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(quick_conversion):
    """Run all in one test, as each export writes hundreds of small files."""


def test_export_says_what_it_wrote(tmp_path, capsys):
    assert main(["conformance", "export", str(tmp_path / "v"), "--level", "L1"]) == 0
    n = sum(case.level == "L1" for case in cases().values())
    assert capsys.readouterr().out == f"{tmp_path / 'v'}: {n} cases of L1; see its README.md\n"
    assert "v exists: choose another name" in fails(capsys, "conformance", "export", tmp_path / "v")


def test_an_unknown_level_is_refused(tmp_path, capsys):
    assert "level is 'L9', expected" in fails(capsys, "conformance", "export", tmp_path / "w", "--level", "L9")


def test_all_that_was_run_passed(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(RIGHT)
    arguments = ["conformance", "run", "--python", str(tmp_path / "mine.py"), "--level", "L1"]
    assert main(arguments) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("float32: levels passed: none; L1 4 of ")
    assert first.endswith("all of them passed")
    assert last.startswith("not run: embed, ")
