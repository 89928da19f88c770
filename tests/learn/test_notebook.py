"""Check docs/walkthrough.ipynb: docs/make_walkthrough.py makes the same, it runs, and the lines of code that it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

from system import ROOT, script

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[notebook]'")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script("docs/make_walkthrough.py")


@pytest.fixture(scope="module")
def stored(maker):
    return nbformat.read(maker.NOTEBOOK, as_version=4)


def test_the_stored_notebook_is_what_the_script_makes(maker, stored):
    def sources(notebook):
        return [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]

    assert sources(stored) == sources(maker.make_notebook()), "run docs/make_walkthrough.py again"
    nbformat.validate(stored)


def test_the_page_is_the_notebook(maker, stored):
    page, pictures = maker.to_markdown(stored)
    assert maker.MARKDOWN.read_text(encoding="utf-8") == page, "run docs/make_walkthrough.py again"
    assert {file.name: file.read_bytes() for file in maker.PICTURES.iterdir()} == pictures
    assert len(pictures) == 4
    for name, content in pictures.items():
        assert name.endswith(".svg")
        assert len(content) < 60_000
        svg = content.decode()
        assert "@media (prefers-color-scheme: dark)" in svg
        assert 'style="fill: #ffffff"' in svg, "the paper, which the dark colours replace"
        width = float(re.search(r'<svg [^>]*width="([\d.]+)pt"', svg.replace("\n", " "))[1])
        assert width * 96 / 72 < 480, "on a phone of 390 pixels letters are nearly as large as on a desktop"


def test_the_lines_of_code_it_names_are_there(maker):
    """Fail when a change of the code has moved lines: the page must be made again."""
    places = re.findall(
        r"`(\w+)\.([\w.]+)` \(\[(npllama/[\w/]+\.py):(\d+)\]\(\.\./\3#L\4\)\)", maker.MARKDOWN.read_text("utf-8")
    )
    assert len(places) > 40
    for module, name, file, line in places:
        assert Path(file).stem == module
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == name.rpartition(".")[2] and node.lineno <= int(line)
        ]
        assert any(int(line) <= node.end_lineno for node in found), f"{file}:{line} is not in {name}: make the page again"


def test_it_runs(maker, stored):
    for name in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[notebook]'")
    made = maker.execute(maker.make_notebook())  # raises where a cell does
    assert not [output for cell in made.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    printed = "".join(output.text for cell in made.cells for output in cell.get("outputs", []) if "text" in output)
    assert "rows of the logits that differ: [16]" in printed
    assert "position 0 is right to the last bit: True" in printed
    assert len(maker.to_markdown(made)[1]) == 4
    for ours, theirs in zip(made.cells, stored.cells, strict=True):
        if ours.cell_type == "code" and "NPLLAMA_LLAMA2_TOKENIZER" not in ours.source:  # which depends on what is there
            assert [output.output_type for output in ours.outputs] == [output.output_type for output in theirs.outputs]
