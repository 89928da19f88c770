"""docs/conformance.md is true: its C program passes, and the matrix is what is measured."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from npllama.cli import main
from npllama.golden.conformance.cases import cases
from npllama.golden.conformance.suite import recorded
from npllama.golden.mistakes import MISTAKES

from system import ROOT, script

PAGE = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")


def test_the_matrix_is_what_is_recorded():
    module = script("docs/make_conformance.py")
    assert module.PAGE.read_text(encoding="utf-8") == module.text(), "run docs/make_conformance.py"


def test_the_page_lists_the_levels():
    rows = re.findall(r"^\| (L\d) \|", PAGE, re.MULTILINE)
    assert rows == sorted({case.level for case in cases().values()})


def test_only_mistakes_that_no_number_shows_are_not_caught():
    """Check that each other mistake is caught, at least by a case of its own operation."""
    caught = {name for measured in recorded().values() for name in measured.catches}
    assert set(MISTAKES) - caught == NOT_CAUGHT, "run tests/record_conformance.py and docs/make_conformance.py"


# Such numbers mask as -inf does, and the judge takes them for it.
NOT_CAUGHT = {"mask_large_number", "mask_lowest_number"}


def test_the_program_in_c(quick_conversion, tmp_path, capsys):
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler is installed")
    program, vectors, results = (str(tmp_path / name) for name in ("l1", "vectors", "results"))
    options = ["-std=c99", "-D_POSIX_C_SOURCE=200809L", "-pedantic", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *options, "-o", program, ROOT / "docs" / "conformance.c", "-lm"], check=True)
    assert main(["conformance", "export", vectors, "--level", "L1"]) == 0
    subprocess.run([program, vectors, results], check=True)
    capsys.readouterr()
    assert main(["conformance", "check", results, "--vectors", vectors, "--level", "L1"]) == 0
    assert capsys.readouterr().out in PAGE
