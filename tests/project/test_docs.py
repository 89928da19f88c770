"""The documentation: links lead somewhere, and functions that it names exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from npllama.activations import AFTER, BEFORE, LAYER
from npllama.cli import main
from npllama.learn.exercises import EXERCISES

from system import ROOT, script

pytestmark = pytest.mark.once
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def links(page) -> list[tuple[str, str]]:
    """Return the text and target of each link in a page, except those in code blocks."""
    return LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page) -> set[str]:
    """Return the anchors of a page's headings, as forges and the site create them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def definitions(path) -> set[str]:
    """Return the functions and classes of a Python file, both as `KVCache.update` and `update`, and its top-level variables."""
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
    """Check [`ops.rms_norm`](../npllama/ops.py): the file's name may stand before the function's."""
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


# ----------------------------------------------------------------------------------------------------------------- the English

CODE = [
    file
    for folder in ("npllama", "convert", "benchmarks", "docs", "tests/helpers")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
NOT_FIRST = re.compile(r"(What|How|Whether|Where|Which|Who|Why)\b")
NO_VERB = re.compile(r"(The|A|An|This|It|Its|There|When|If|Our|NAME)\b")
UNCLEAR = re.compile(r"\b(beside|anew|looked at|told by|as it has it|what it wants|is had)\b")


def docstrings() -> Iterator[tuple[str, str, bool]]:
    """Yield the place of each docstring, its text, and whether it is a function's."""
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'module')}"
                yield where, ast.get_docstring(node) or "", isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def test_a_docstring_opens_with_a_verb_and_a_class_or_module_with_what_it_is():
    wrong = [
        where for where, text, of_function in docstrings() if NOT_FIRST.match(text) or (of_function and NO_VERB.match(text))
    ]
    assert not wrong


def test_words_that_must_be_read_twice_are_avoided():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    texts = [*((page.name, page.read_text(encoding="utf-8")) for page in pages), *(found[:2] for found in docstrings())]
    assert [(where, found[0]) for where, text in texts if (found := UNCLEAR.search(text))] == []


# ------------------------------------------------------------------------------------------------------------------- the site


def of_the_site(name):
    """Import a file of docs/site."""
    return script(f"docs/site/{name}.py")


@pytest.mark.parametrize(
    ("text", "rst"),
    [
        ("One sentence\nin two lines.", "One sentence\nin two lines."),
        ("A sentence.    [..., T] -> [V]", "A sentence.\n\n.. code-block:: text\n   :class: formula\n\n   [..., T] -> [V]"),
        (
            "y = a·x        x [D], a [D] -> [D]\nA paper.",
            ".. code-block:: text\n   :class: formula\n\n   y = a·x\n   x [D], a [D] -> [D]\n\nA paper.",
        ),
        ("h = x + f(x)", ".. code-block:: text\n   :class: formula\n\n   h = x + f(x)"),
        (
            "name   what\nother  it is [2]",
            ".. list-table::\n\n   * - ``name``\n     - what\n   * - ``other``\n     - it is [2]",
        ),
        ("name   what\n       it is", ".. list-table::\n\n   * - ``name``\n     - what it is"),
        ("    b  batch\n    t  tokens", ".. code-block:: text\n\n   b  batch\n   t  tokens"),
        (
            "    B  batch   T  new tokens\n    V  ids",
            ".. list-table::\n\n   * - ``B``\n     - batch\n   * - ``T``\n     - new tokens\n   * - ``V``\n     - ids",
        ),
        ("| a | b |\n|---|---|\n| 1 | 2 |", ".. list-table::\n   :header-rows: 1\n\n   * - a\n     - b\n   * - 1\n     - 2"),
        ("| a | b |\n|---|---|\n| 1 | |", ".. list-table::\n   :header-rows: 1\n\n   * - a\n     - b\n   * - 1\n     -"),
        ("| a |\n|---|\n| 1\n    2 |", ".. list-table::\n   :header-rows: 1\n\n   * - a\n   * - 1 2"),
        ("x_1 * y_2 <s> and `x_1 * y_2`", "x\\_1 \\* y\\_2 <s> and \\ ``x_1 * y_2``"),
        ("`a`s and `b`.", "``a``\\ s and \\ ``b``\\ ."),
        ("First.\n\n\nSecond.", "First.\n\nSecond."),
    ],
)
def test_plain_docstrings_as_restructured_text(text, rst):
    assert of_the_site("docstrings").to_rst(text) == rst


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[`ops.rms_norm`](../npllama/ops.py)", "{any}`ops.rms_norm <npllama.ops.rms_norm>`"),
        ("[`KVCache.update`](../npllama/cache.py)", "{any}`KVCache.update <npllama.cache.KVCache.update>`"),
        ("[ops.py](../npllama/ops.py)", "{any}`ops.py <npllama.ops>`"),
        ("[`test_model`](../tests/test_goldens.py)", "[`test_model`](#source-tests-test-goldens-py-test-model)"),
        ("[setup](../setup.cfg)", "[setup](#source-setup-cfg)"),
    ],
)
def test_links_to_code_lead_into_the_site(link, expected):
    build = of_the_site("build")
    assert build.on_site(*build.LINK.fullmatch(link).groups()) == expected


def test_a_line_leads_to_its_function():
    build = of_the_site("build")
    line = build.definitions("npllama/ops.py")["rope"] + 3
    assert build.on_site("`ops.py`", "npllama/ops.py", str(line)) == "{any}`ops.py <npllama.ops.rope>`"


def test_every_page_is_in_the_navigation_in_its_place(tmp_path):
    """Check that the sections have what their lists name; a page that no list names comes under More."""
    build = of_the_site("build")
    build.write_sources(tmp_path / "docs")
    text = (tmp_path / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^[\w./-]+$", text.partition("{toctree}")[2], re.MULTILINE)
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(listed)
    assert len(listed) == len(set(listed))
    reference = [name for name in listed if name.startswith("reference/")]
    assert reference[:3] == ["reference/npllama", "reference/npllama.model", "reference/npllama.ops"]
    for caption in build.NAVIGATION:
        assert f":caption: {caption}\n" in text
    first = (tmp_path / "docs" / "reference" / "npllama.md").read_text(encoding="utf-8")
    assert re.findall(r"auto\w+:: npllama\.(\w+)", first)[:3] == ["load", "forward", "complete"]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<p>a `b` c</p>", "has a backtick: a `b` c"),
        ("<p><code>`b`</code></p>", None),
        ('<script src="https://x.org/a.js"></script>', "loads https://x.org/a.js"),
        ('<link href="//x.org/a.css">', "loads //x.org/a.css"),
        ('<a href="https://x.org">x</a><img src="a.png">', None),
    ],
)
def test_pages_are_checked(page, said, tmp_path):
    (tmp_path / "a.html").write_text(page)
    assert of_the_site("build").problems(tmp_path) == ([f"a.html {said}"] if said else [])


def test_a_long_name_breaks_at_its_parts_and_an_option_nowhere():
    context = {"body": '<td><code><span class="pre">--top-p</span> <span class="pre">a_b</span></code> 1.5e-05</td>'}
    of_the_site("conf").break_names(None, "", "", context, None)
    assert context["body"] == (
        '<td><code><span class="pre option">--top-p</span> <span class="pre">a_<wbr>b</span></code> '
        '<span class="number">1.5e-05</span></td>'
    )
    assert ".option" in (ROOT / "docs" / "site" / "site.css").read_text(encoding="utf-8")


def formulas() -> set[str]:
    """Return the TeX of the activation table and of the pages."""
    found = {row.tex for row in (*BEFORE, *LAYER, *AFTER)}
    for page in PAGES:
        text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
        found |= {a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.DOTALL)}
    return found


def test_every_formula_is_typeset():
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed")
    mathml = of_the_site("conf").mathml
    assert len(formulas()) >= 15
    for tex in formulas():
        drawn = mathml(tex, "block")
        assert drawn.startswith("<math"), tex
        assert "\\" not in drawn, f"{tex}: a command that is not known"
