"""The documentation: what it links to and what it names is there."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest

from npllama.cli import main
from npllama.learn.exercises import EXERCISES

from system import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def links(page) -> list[tuple[str, str]]:
    """The text and target of each link in a page, but for those in its code."""
    return LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page) -> set[str]:
    """The anchors of a page's headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def definitions(path) -> set[str]:
    """Functions and classes of a Python file, `KVCache.update` and `update` both, and what it assigns at its top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {
        name.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }

    def visit(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.update({child.name, above + child.name})
                visit(child, above + child.name + ".")

    visit(tree, "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for _, target in links(page):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_function_that_a_link_names_is_in_the_file_it_leads_to(page):
    """[`ops.rms_norm`](../npllama/ops.py): the file's name may stand before the function's."""
    for text, target in links(page):
        if not (target.endswith(".py") and re.fullmatch(r"`[\w.]+`", text)):
            continue
        path = (page.parent / target).resolve()
        name = text.strip("`")
        while name and name not in definitions(path) and name.split(".")[0] in path.with_suffix("").parts:
            name = name.partition(".")[2]
        assert name in definitions(path), f"{path.name} defines no {text}"


def test_each_formula_has_a_paper_a_function_and_a_test():
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("| formula | paper |")[1].splitlines()[2:] if line.startswith("|")]
    for name in ("RMSNorm", "RoPE", "GQA", "SwiGLU", "Llama 3.1's scaling"):
        assert any(row.startswith(f"| {name}") for row in rows), name
    for row in rows:
        _, _, function, test = row.strip("| ").split("|")
        assert "](../npllama/" in function, row
        assert re.search(r"\[`test_\w+`\]\(\.\./tests/", test), row


def test_the_exercises_page_lists_them_in_order():
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| (\w+) \|.*\[`([\w.]+)`\]", text, re.MULTILINE)
    assert rows == [(exercise.name, exercise.real) for exercise in EXERCISES]


def test_the_exercises_page_prints_what_the_command_prints(tmp_path, capsys):
    body = "return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps) * weight"
    (tmp_path / "02_rms_norm.py").write_text(f"import numpy as np\n\ndef rms_norm(x, weight, eps):\n    {body}\n")
    assert main(["exercise", "check", str(tmp_path), "rms_norm"]) == 1
    assert capsys.readouterr().out in (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------- docstrings, as on the site


@pytest.fixture(scope="module")
def to_markdown():
    pytest.importorskip("griffe", reason="griffe is not installed")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "site" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.to_markdown


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("One sentence\nin two lines.", "One sentence\nin two lines."),
        ("A sentence.    [..., T] -> [V]", "A sentence.\n\n``` { .text .formula }\n[..., T] -> [V]\n```"),
        (
            "y = a·x        x [D], a [D] -> [D]\nA paper.",
            "``` { .text .formula }\ny = a·x\nx [D], a [D] -> [D]\n```\n\nA paper.",
        ),
        ("h = x + f(x)", "``` { .text .formula }\nh = x + f(x)\n```"),
        ("name   what\nother  it is [2]", "| | |\n|---|---|\n| `name` | what |\n| `other` | it is \\[2\\] |"),
        ("name   what\n       it is", "| | |\n|---|---|\n| `name` | what it is |"),
        ("    B  batch\n    T  tokens", "``` { .text }\nB  batch\nT  tokens\n```"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "| a | b |\n|---|---|\n| 1 | 2 |"),
        ("x_1 * y_2 <s> and `x_1 * y_2`", "x\\_1 \\* y\\_2 &lt;s> and `x_1 * y_2`"),
        ("First.\n\n\nSecond.", "First.\n\nSecond."),
    ],
)
def test_plain_docstrings_as_markdown(to_markdown, text, markdown):
    assert to_markdown(text) == markdown
