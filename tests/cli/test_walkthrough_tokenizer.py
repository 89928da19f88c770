"""Test npllama walkthrough-tokenizer, and its old name, `walkthrough --tokenizer`."""

from __future__ import annotations

import pytest

from npllama.checkpoint import demo_path
from npllama.cli import main

from commands import fails


@pytest.mark.parametrize("text", [[], ["hello user"]], ids=["default", "given"])
@pytest.mark.parametrize("options", [[], ["--markdown"], ["--compare", "DEMO"]], ids=" ".join)
def test_the_old_spelling_prints_the_same(text, options, tiny_tiktoken_file, capsys):
    options = ["-m", str(tiny_tiktoken_file), *(option.replace("DEMO", str(demo_path())) for option in options)]
    assert main(["walkthrough-tokenizer", *text, *options]) == 0
    found = capsys.readouterr().out
    assert ("2,256 ids" in found) == ("--compare" in options)
    assert (" ".join(text) or "Don't panic") in found
    assert main(["walkthrough", "--tokenizer", *text, *options]) == 0
    assert capsys.readouterr().out == found


def test_it_needs_a_tokenizer(bare, capsys):
    assert "has no tokenizer" in fails(capsys, "walkthrough-tokenizer", "x", "-m", bare)
