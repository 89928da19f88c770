"""The house: who may import whom, and what `import npllama` costs."""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
import sys

import pytest

from conftest import ROOT

# Each file may import those before it. cli.py alone may import the converter, inside the command that needs it.
ORDER = [
    "errors",
    "foreign",
    "config",
    "threads",
    "memory",
    "weights",
    "linear",
    "layout",
    "ops",
    "cache",
    "scope",
    "fast",
    "model",
    "activations",
    "precision",
    "tokenizer",
    "atomic",
    "store",
    "checkpoint",
    "chat",
    "sampling",
    "generation",
    "profile",
    "perplexity",
    "console",
    "chat_loop",
    "known_answers",
    "trace",
    "golden",
    "mistakes",
    "compare",
    "lesson",
    "walkthrough",
    "tokenizer_lesson",
    "exercises",
    "grading",
    "lens",
    "plot",
    "explain",
    "cli",
    "__init__",
    "__main__",
]
HEAVY = {"torch", "transformers", "tiktoken", "sentencepiece", "tokenizers", "blobfile", "matplotlib", "bokeh", "tqdm"} | {
    "npllama_convert"
}
FILES = sorted(path for path in (ROOT / "npllama").glob("*.py"))
COMPARE = ["names", "metrics", "inputs", "maps", "noise", "judging", "angles", "hints", "comparison", "text", "html", "report"]


def imports(tree: ast.AST, top_level_only: bool = False) -> set[str]:
    """Imported modules: our own as `.name`, others by their first part."""
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_upward(path):
    place = ORDER.index(path.stem)
    own = {name[1:].split(".")[0] for name in imports(ast.parse(path.read_text())) if name.startswith(".")} - {"__version__"}
    assert own <= set(ORDER[:place]), f"{path.name} imports what stands below it"


def test_compare_is_in_order_too():
    """Within the package likewise; from outside it takes what stands above it."""
    folder = ROOT / "npllama" / "compare"
    assert {path.stem for path in folder.glob("*.py")} == {*COMPARE, "__init__"}
    for place, name in enumerate([*COMPARE, "__init__"]):
        tree = ast.parse((folder / f"{name}.py").read_text())
        assert not imports(tree) & {"torch", "transformers", "npllama_convert"}
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level):
            taken = {node.module} if node.module else {alias.name for alias in node.names}
            allowed = COMPARE[:place] if node.level == 1 else ORDER[: ORDER.index("compare")]
            assert taken <= set(allowed), f"compare/{name}.py imports {taken}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_heavy_at_the_top_and_no_torch_anywhere(path):
    tree = ast.parse(path.read_text())
    assert not imports(tree, top_level_only=True) & HEAVY
    allowed = {"npllama_convert"} if path.stem == "cli" else set()
    assert imports(tree) & {"torch", "transformers", "npllama_convert"} <= allowed


def test_the_math_sees_no_file_and_no_tokenizer():
    for name in ("ops", "fast", "cache", "model"):
        found = imports(ast.parse((ROOT / "npllama" / f"{name}.py").read_text()))
        own = {".cache", ".config", ".fast", ".linear", ".ops", ".scope", ".threads", ".weights"}
        assert found <= own | {"__future__", "collections", "functools", "math", "dataclasses", "typing", "numpy"}, name


def run(code: str) -> str:
    # From a folder without the sources: the installed package is measured where there is one, compiled as its users have it.
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "tests").stdout


def test_import_brings_numpy_and_nothing_heavy():
    """All public names do: the package loads each when it is first asked for."""
    code = "import sys; from npllama import *; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = run(code).split()
    assert "numpy" in loaded
    assert not HEAVY & set(loaded)


def test_every_error_of_ours_has_one_base():
    """So that a caller tells them from everything else."""
    builtin = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)}
    for path in (path for folder in ("npllama", "convert") for path in (ROOT / folder).rglob("*.py")):
        for node in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            assert path.stem == "errors" or not bases & builtin, f"{path.name}: {node.name} is no NpllamaError"


def test_import_costs_at_most_a_tenth_of_a_second_beyond_numpy():
    """Or as much as NumPy does, where that is more: on a slow machine."""
    code = "from time import process_time as t; a = t(); import numpy; b = t(); from npllama import load; print(b - a, t() - b)"
    of_numpy, ours = zip(*(map(float, run(code).split()) for _ in range(5)), strict=True)
    assert min(ours) < max(0.1, min(of_numpy))


def test_model_py_can_be_read_in_one_sitting():
    assert len((ROOT / "npllama" / "model.py").read_text().splitlines()) <= 150


@pytest.mark.skipif(os.environ.get("NPLLAMA_WITHOUT_TORCH") != "1", reason="NPLLAMA_WITHOUT_TORCH is not 1: torch may be here")
def test_torch_is_really_absent():
    """CI's first environment sets NPLLAMA_WITHOUT_TORCH, so that what passes there has passed without torch."""
    with pytest.raises(ModuleNotFoundError, match="No module named 'torch'"):
        import torch  # noqa: F401
