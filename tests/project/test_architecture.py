"""The architecture: which module may import which, and the cost of `import npllama`."""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from system import ROOT

# Each file may import those before it, those of earlier packages and of its own included. A package's name stands for its
# __init__.py, from which other packages import names. Nobody imports the command line, and it alone imports the converter,
# inside the command that needs it.
ORDER = [
    "errors",
    "config",
    "engine.threads",
    "engine.memory",
    "engine.weights",
    "engine.ranks.groups",
    "engine.ranks.shares",
    "engine.grouped",
    "engine.ranks.local",
    "engine.ranks.mpi",
    "engine.linear",
    "engine.layout",
    "engine",
    "ops",
    "cache",
    "scope",
    "engine.ranks.passes",
    "engine.fast",
    "model",
    "activations",
    "engine.ranks.leading",
    "engine.ranks",
    "checkpoint.foreign",
    "checkpoint.atomic",
    "checkpoint.store",
    "checkpoint.format",
    "tokenizer",
    "checkpoint.reading",
    "checkpoint.writing",
    "checkpoint.verifying",
    "checkpoint",
    "templates.child",
    "templates.rendering",
    "templates",
    "chat",
    "sampling",
    "generation",
    "text.batching",
    "text.completion",
    "text.conversation",
    "text",
    "golden.precision",
    "engine.ranks.following",
    "golden.trace",
    "golden.bundle",
    "golden.mistakes",
    "golden.compare.names",
    "golden.compare.metrics",
    "golden.compare.inputs",
    "golden.compare.known_maps",
    "golden.compare.maps",
    "golden.compare.noise",
    "golden.compare.judging",
    "golden.compare.angles",
    "golden.compare.hints",
    "golden.compare.comparison",
    "golden.compare.text",
    "golden.compare.html",
    "golden.compare.report",
    "golden.compare",
    "golden.conformance.numbers",
    "golden.conformance.arrays",
    "golden.conformance.models",
    "golden.conformance.model_files",
    "golden.conformance.config_files",
    "golden.conformance.chats",
    "golden.conformance.chat_templates",
    "golden.conformance.texts",
    "golden.conformance.operations",
    "golden.conformance.cases",
    "golden.conformance.judging",
    "golden.conformance.measuring",
    "golden.conformance.suite",
    "golden.conformance.grading",
    "golden.conformance.report",
    "golden.conformance",
    "golden",
    "evaluate.perplexity",
    "evaluate.profile",
    "evaluate.known_answers",
    "evaluate",
    "learn.lesson",
    "learn.walkthrough",
    "learn.tokenizer_lesson",
    "learn.exercises.exercise",
    "learn.exercises.softmax",
    "learn.exercises.rms_norm",
    "learn.exercises.rope_frequencies",
    "learn.exercises.rope",
    "learn.exercises.causal_mask",
    "learn.exercises.attention_scores",
    "learn.exercises.attention_heads",
    "learn.exercises.swiglu",
    "learn.exercises.probabilities",
    "learn.exercises.cache_update",
    "learn.exercises.linear",
    "learn.exercises.byte_pair",
    "learn.exercises.scaled_rope",
    "learn.exercises.cache_bytes",
    "learn.exercises.round_bfloat16",
    "learn.exercises.relative_error",
    "learn.exercises.draw",
    "learn.exercises.surprise",
    "learn.exercises",
    "learn.grading",
    "learn.course",
    "learn.lens",
    "learn.figure",
    "learn.plot",
    "learn.explain",
    "learn",
    "serve.requests",
    "serve.replies",
    "serve.worker",
    "serve.choices",
    "serve.app",
    "serve.server",
    "serve",
    "cli.console",
    "cli.options",
    "cli.chat_loop",
    "cli.convert",
    "cli.fetch",
    "cli.models",
    "cli.generate",
    "cli.chat",
    "cli.run",
    "cli.serve",
    "cli.logits",
    "cli.trace",
    "cli.capture",
    "cli.golden",
    "cli.compare",
    "cli.conformance",
    "cli.walkthrough_tokenizer",
    "cli.walkthrough",
    "cli.plot",
    "cli.explain",
    "cli.tokenize",
    "cli.perplexity",
    "cli.info",
    "cli.verify",
    "cli.check",
    "cli.exercise",
    "cli",
    "__init__",
    "__main__",
]
CONVERTER_USERS = {"cli.convert", "cli.fetch", "cli.models", "cli.capture", "cli.run"}
HEAVY = {
    "torch",
    "jinja2",
    "transformers",
    "tiktoken",
    "sentencepiece",
    "tokenizers",
    "blobfile",
    "matplotlib",
    "bokeh",
    "tqdm",
} | {"npllama_convert"}


def module_of(path: Path) -> str:
    """Return a file's module below npllama: `engine.linear`, `engine` for its __init__.py, `__init__` for the package's own."""
    parts = path.relative_to(ROOT / "npllama").with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


FILES = {module_of(path): path for path in sorted((ROOT / "npllama").rglob("*.py"))}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Return the modules that a file imports: our own as `.engine.linear`, others by their first part."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    package = path.parent.relative_to(ROOT / "npllama").parts
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            start = [*package[: len(package) - node.level + 1], *((node.module or "").split(".") if node.module else ())]
            for alias in node.names:
                name = ".".join([*start, alias.name])
                found.add("." + (name if name in FILES else ".".join(start)))
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - {"."}  # __version__


def test_every_file_has_its_place():
    assert sorted(ORDER) == sorted(FILES)


def test_the_top_level_is_what_one_reads():
    """Check that few files are there; the others are in packages."""
    assert len([path for path in (ROOT / "npllama").iterdir() if path.is_file()]) <= 14


@pytest.mark.parametrize("name", FILES)
def test_imports_point_upward(name):
    own = {found[1:] for found in imports(FILES[name]) if found.startswith(".")}
    assert own <= set(ORDER[: ORDER.index(name)]), f"{name} imports what stands below it"


@pytest.mark.parametrize("name", FILES)
def test_nothing_heavy_at_the_top_and_no_torch_anywhere(name):
    assert not imports(FILES[name], top_level_only=True) & HEAVY
    allowed = {"npllama_convert"} if name in CONVERTER_USERS else set()
    assert imports(FILES[name]) & {"torch", "transformers", "npllama_convert"} <= allowed


# ------------------------------------------------------------------------------------------------------------------ the tests

TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if "ports" not in path.relative_to(ROOT).parts]
HELPERS = {path.stem for path in TESTS if path.parent.name == "helpers"}
# In tests/ itself, next to the tests, are the programs that a developer runs.
PROGRAMS = {
    "make_goldens.py",
    "record_chat_vectors.py",
    "record_conformance.py",
    "record_tokenizer_vectors.py",
    "fetch_llama3_tokenizer.py",
}


def imported_names(path: Path) -> set[str]:
    """Return all that a file imports, with dots: `npllama.engine` and `npllama.engine.linear` for one from the other."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_test_imports_another():
    """Check that tests share code only through tests/helpers, and that no helper is a test."""
    for path in TESTS:
        tests = {name for name in imported_names(path) if re.match(r"(.*\.)?(test_\w+|conftest)(\.|$)", name)}
        assert not {name for name in tests if not name.startswith("npllama")}, path


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_tests_use_no_private_member(path):
    """Forbid it: a test of a private function freezes the code; a function that a test replaces has a public name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("npllama", "npllama_convert"):
            own |= {alias.asname or alias.name for alias in node.names}
    private = re.compile(r"_[a-z]\w*")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
            assert not private.fullmatch(node.attr), f"{path}:{node.lineno}: {node.value.id}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            for text in [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]:
                assert not private.fullmatch(text.rpartition(".")[2]), f"{path}:{node.lineno}: {text}"


def test_helpers_live_in_one_place():
    for path in TESTS:
        if path.parent.name == "helpers":
            assert not path.name.startswith("test_"), path
        elif path.name not in {"conftest.py"} | (PROGRAMS if path.parent == ROOT / "tests" else set()):
            assert path.name.startswith("test_"), f"{path}: no test, so its place is tests/helpers"


# A test of these packages need not import the module: it calls the command, or solves the exercise, by its name.
BY_NAME = {"cli", "learn.exercises"}
MODULES = sorted(name for name, path in FILES.items() if path.stem not in ("__init__", "__main__"))


def used_modules(path: Path) -> set[str]:
    """Return the modules of npllama from which a file imports, also through the names of a package's __init__.py."""
    found = set()
    for name in imported_names(path):
        if name.startswith("npllama."):
            module, _, last = name.rpartition(".")
            value = getattr(importlib.import_module(module), last, None)
            found |= {name, getattr(value, "__module__", None) or name}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_each_module_has_a_test_in_the_folder_of_its_room(name):
    """Find the test file: it has the module's name or imports it, in the folder of the module's package or below."""
    room, _, own = name.rpartition(".")
    files = sorted((ROOT / "tests" / room.replace(".", "/")).glob("**/test_*.py" if room else "test_*.py"))
    named = any(path.name == f"test_{own}.py" for path in files)
    if room in BY_NAME and not named:
        words = {own, own.replace("_", "-")}
        constants = (node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        named = any(node.value in words for node in constants if isinstance(node.value, str))
    assert named or any(f"npllama.{name}" in used_modules(path) for path in files)


# ---------------------------------------------------------------------------------------------------------------- the library


# The files of BY_NAME are alike: commands, exercises. The top level is in CONTRIBUTING.md.
PACKAGES = {name: path.parent for name, path in FILES.items() if path.stem == "__init__" and name not in {"__init__", *BY_NAME}}
PACKAGES |= {"convert": ROOT / "convert"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_says_what_is_in_each_file(name):
    text = ast.get_docstring(ast.parse((PACKAGES[name] / "__init__.py").read_text(encoding="utf-8")))
    files = {path.name for path in PACKAGES[name].glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", text)) & files == files


def test_the_math_sees_no_file_and_no_tokenizer():
    own = {".cache", ".config", ".ops", ".scope", ".engine", ".errors"}
    own |= {f".engine.{name}" for name in ("fast", "linear", "ranks.passes", "threads", "weights")}
    for name in ("ops", "engine.fast", "cache", "scope", "model"):
        library = {"__future__", "collections", "functools", "math", "dataclasses", "typing", "numpy"}
        assert imports(FILES[name]) <= own | library, name


def test_one_reader_of_json():
    """Read foreign JSON with limits of size and depth, which the json module doesn't have."""
    readers = {"load", "loads", "JSONDecoder", "raw_decode"}
    for path in (path for folder in ("npllama", "convert") for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "json"}
        found |= {
            a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "json" for a in node.names
        }
        of_ranks = FILES["engine.ranks.local"], FILES["engine.ranks.mpi"]  # who read what our own processes write
        assert path in (FILES["checkpoint.foreign"], *of_ranks) or not found & readers, path


def run(code: str) -> str:
    # From a folder without the sources: the installed package is measured where there is one, compiled as its users have it.
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "tests").stdout


def test_import_brings_numpy_and_nothing_heavy():
    """Import all public names: the package loads each one at its first use."""
    code = "import sys; from npllama import *; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = run(code).split()
    assert "numpy" in loaded
    assert not HEAVY & set(loaded)


def test_the_command_line_starts_without_what_one_command_needs():
    """Build all parsers, as every command does: a heavy import in one would slow down `npllama --help`."""
    code = "import sys; from npllama.cli import build_parser; build_parser(); print(*sys.modules)"
    loaded = set(run(code).split())
    assert "npllama.cli.exercise" in loaded
    rooms = ("learn", "evaluate", "serve", "golden.trace", "golden.bundle", "golden.compare", "golden.conformance")
    assert not [name for name in loaded if name.startswith(tuple(f"npllama.{room}" for room in rooms))]
    assert not HEAVY & {name.split(".")[0] for name in loaded}


def test_every_error_of_ours_has_one_base():
    """Check the one base class, by which a caller distinguishes our errors from all others."""
    builtin = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)}
    for path in (path for folder in ("npllama", "convert") for path in (ROOT / folder).rglob("*.py")):
        for node in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            assert path.stem == "errors" or not bases & builtin, f"{path.name}: {node.name} is no NpllamaError"


def test_import_costs_at_most_a_tenth_of_a_second_beyond_numpy():
    """Allow as much as NumPy itself takes, if that is more, as on a slow machine."""
    code = "from time import process_time as t; a = t(); import numpy; b = t(); from npllama import load; print(b - a, t() - b)"
    of_numpy, ours = zip(*(map(float, run(code).split()) for _ in range(5)), strict=True)
    assert min(ours) < max(0.1, min(of_numpy))


def test_model_py_can_be_read_in_one_sitting():
    assert len((ROOT / "npllama" / "model.py").read_text().splitlines()) <= 150


@pytest.mark.skipif(os.environ.get("NPLLAMA_WITHOUT_TORCH") != "1", reason="NPLLAMA_WITHOUT_TORCH is not 1: torch may be here")
def test_torch_is_really_absent():
    """Prove that CI's first environment, which sets NPLLAMA_WITHOUT_TORCH, has no torch."""
    with pytest.raises(ModuleNotFoundError, match="No module named 'torch'"):
        import torch  # noqa: F401


def test_a_test_that_imports_torch_is_marked():
    """Require the marker: without it the test fails where torch is absent, instead of being skipped."""
    for path in TESTS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any("mark.torch" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)):
            continue  # pytestmark
        for test in (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            imported = [node for node in ast.walk(test) if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {getattr(node, "module", None) or node.names[0].name for node in imported}
            says_so = any(words in ast.unparse(test) for words in ("importorskip('torch'", "pytest.raises(ModuleNotFoundError"))
            if any(name.split(".")[0] == "torch" for name in names) and not says_so:
                assert any("mark.torch" in ast.unparse(mark) for mark in test.decorator_list), f"{path}: {test.name}"
