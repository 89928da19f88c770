"""The summary of skipped tests: causes with counts, each with the command that installs what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from skips import command_for, summary
from system import ROOT

REASONS = sorted(
    {
        re.sub(r"\{.*?\}", "name", reason)
        for path in (ROOT / "tests").rglob("*.py")
        for reason in re.findall(r'(?:\breason=|pytest\.skip\()f?"([^"]+)"', path.read_text(encoding="utf-8"))
    }
)
# No command provides another system.
OF_THE_SYSTEM = re.compile(
    r"system|POSIX|signals|streams|pipes|this Python|/dev/|/proc|mount|big-endian|virtual environment|FIFO|root"
)


def test_causes_are_counted_with_the_most_frequent_first():
    skipped = [("Skipped: regex is not installed", False), ("Skipped: torch is not installed", False)] * 2
    skipped += [("Skipped: torch is not installed", True), ("Skipped: no fork on this system", False)]
    assert summary(skipped) == [
        "2 tests and 1 file skipped: torch is not installed: pip install -c .ci/constraints.txt -e '.[dev]'",
        "2 tests skipped: regex is not installed: pip install -c .ci/constraints.txt -e '.[dev]'",
        "1 test skipped: no fork on this system",
    ]


@pytest.mark.parametrize("reason", REASONS)
def test_every_cause_but_the_system_has_its_command(reason):
    says_it = re.search(r"npllama golden|npllama fetch|pip install|apt-get install", reason)
    assert command_for(reason) or says_it or OF_THE_SYSTEM.search(reason)


@pytest.mark.once
def test_a_run_ends_with_the_causes():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NPLLAMA_")}
    environment["NPLLAMA_SHARED_DATA"] = "/no/where"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/convert/test_convert_llama2c.py"]
    command += ["-k", "stories260k"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"^1 test skipped: (real data is absent|torch is not installed).*: (NPLLAMA_SHARED_DATA|pip)", done.stdout, re.M
    )
