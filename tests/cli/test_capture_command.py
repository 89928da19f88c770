"""Test npllama capture without torch: bad input gives one line and status 2."""

from __future__ import annotations

import pytest

from npllama.cli import main


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "the following arguments are required: --tokens, --out"),
        (["nowhere", "--tokens", "1,x", "--out", "t"], "argument --tokens: "),
        (["nowhere", "--tokens", "1", "--out", "t", "--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
    ],
)
def test_bad_arguments_of_capture_are_a_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["capture", *arguments])
    assert exit.value.code == 2
    found = capsys.readouterr().err
    assert found.startswith(f"npllama capture: {line}")
    assert found.count("\n") == 1
