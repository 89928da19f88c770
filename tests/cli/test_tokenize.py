"""Test npllama tokenize: text to ids and back."""

from __future__ import annotations

from npllama.cli import main


def test_tokenize_there_and_back(capsys):
    text = "To be, or not to be: that is the question.\n"
    assert main(["tokenize", text]) == 0
    line = capsys.readouterr().out.strip()
    assert main(["tokenize", "--decode", line]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert main(["tokenize", "--bos", "--pieces", "ROMEO"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == ["2000", "<|begin_of_text|>"]
    assert "".join(line.split()[1] for line in rest) == "ROMEO"
