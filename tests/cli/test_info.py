"""Test npllama info: its output describes the directory."""

from __future__ import annotations

from npllama.cli import main

from tiny import CONFIGS, random_params


def test_info_says_what_there_is(bare, capsys):
    assert main(["info", str(bare)]) == 0
    out = capsys.readouterr().out
    n = sum(x.size for x in random_params(CONFIGS["grouped"], 1).values())
    assert f"{n:,} parameters in 21 tensors" in out
    assert "n_kv_heads       2" in out
    assert "tokenizer: none" in out
