"""Test npllama logits: the file equals forward()'s logits, or there is none."""

from __future__ import annotations

import os

import numpy as np

import npllama
from npllama import forward
from npllama.cli import main

from commands import fails
from tiny import relative_error


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
