"""Test npllama verify: the verdict and the exit status."""

from __future__ import annotations

from npllama.cli import main

from commands import fails


def test_verify_tells_whole_from_altered(copy_of_demo, capsys):
    assert main(["verify", str(copy_of_demo)]) == 0
    capsys.readouterr()
    file = copy_of_demo / "norm.weight.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    line = fails(capsys, "verify", copy_of_demo, status=1)
    assert "norm.weight.npy is altered" in line
