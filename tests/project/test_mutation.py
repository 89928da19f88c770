"""Mutation testing: which code is changed, that a seed determines the sample, and that a mutant changes only its copy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mutation

pytestmark = [pytest.mark.once, pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork a process")]

SOURCE = '''
"""A module."""
from a import b

def f(x: int | None = 3, *rest: str) -> "float":
    """Nothing + here."""
    if x < 0:
        raise ValueError(f"x is {x - 1}")
    return g(x, scale=2).reshape(-1) + rest.count("a")

class C:
    size = 4
    pairs = zip([], [], strict=True)

TILE = 5
'''


def needs_mutmut() -> None:
    pytest.importorskip("mutmut", reason="mutmut is not installed")


def changes(only: tuple[str, ...] = ()) -> set[str]:
    return {mutation.change(SOURCE, variant()) for site in mutation.sites(SOURCE, only) for variant in site.variants}


def test_numbers_operators_and_arguments_change_and_words_do_not():
    needs_mutmut()
    call = 'return g(x, scale=2).reshape(-1) + rest.count("a")'
    assert changes() == {
        'def f(x: int | None = 3, *rest: str) -> "float": → def f(x: int | None = 4, *rest: str) -> "float":',
        "if x < 0: → if x <= 0:",
        "if x < 0: → if x < 1:",
        f'{call} → return g(x, scale=2).reshape(-1) - rest.count("a")',
        f'{call} → return g(x, scale=2).reshape(+1) + rest.count("a")',
        f'{call} → return g(x, scale=3).reshape(-1) + rest.count("a")',
        f'{call} → return g(scale=2).reshape(-1) + rest.count("a")',
        f'{call} → return g(x, ).reshape(-1) + rest.count("a")',
        "size = 4 → size = 5",
        "pairs = zip([], [], strict=True) → pairs = zip([], strict=True)",
    }
    assert "size = 4 → size = 5" in changes(only=("C",))
    assert len(changes(only=("C",))) == 2


def test_a_seed_is_a_draw_of_different_programs():
    needs_mutmut()
    modules = [module for module in mutation.CORE if module.path.endswith("scope.py")]
    draws = [list(mutation.draw(mutation.ROOT, modules, seed, 10)) for seed in (1, 1, 2)]
    drawn, again, other = [[(mutant.module, mutant.line, mutant.change) for _, mutant, _ in found] for found in draws]
    assert drawn == again != other
    assert len(set(drawn)) == 10
    for module, _, source in draws[0]:
        original = (mutation.ROOT / module.path).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(source)) != ast.dump(ast.parse(original))


def test_the_draw_elsewhere_stays_when_a_line_is_added(tmp_path):
    needs_mutmut()
    module = mutation.Module("npllama/x.py", "test_x")
    (tmp_path / "npllama").mkdir()
    draws = []
    for source in ("def f(x):\n    return x + 1\n", "SIZE = 3\n\n\ndef f(x):\n    return x + 1\n"):
        (tmp_path / module.path).write_text(source)
        draws.append({mutant.key: mutant.change for _, mutant, _ in mutation.draw(tmp_path, [module], 1, 9)})
    before, after = draws
    assert [len(before), len(after)] == [2, 3]
    assert before.items() < after.items()


def test_the_table_names_what_there_is():
    for module in mutation.CORE:
        tree = ast.parse((mutation.ROOT / module.path).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert defined.issuperset(module.only), module.path
        for name in module.tests.split():
            assert (mutation.ROOT / "tests" / f"{name}.py").is_file(), name


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Create a snapshot of a repository with the least that the launcher needs."""
    root = tmp_path_factory.mktemp("root")
    for name in ("npllama/__init__.py", "convert/__init__.py", "tests/test_x.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return mutation.snapshot(root, tmp_path_factory.mktemp("tree"))


FATES = {
    "survived": "",
    "failed": "assert False",
    "crashed": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "timeout, as it waits": "import time; time.sleep(600)",
    "timeout, as it loops": "while True: pass",
}


@pytest.fixture(scope="module")
def launcher():
    found = mutation.Launcher()
    yield found
    found.close()


@pytest.mark.parametrize("fate", FATES)
def test_what_became_of_a_mutant(tree, launcher, fate):
    outcome, _, why = fate.partition(", as it ")
    limit, window = 3 if why == "loops" else 120, 2 if why == "waits" else 120
    with mutation.copy_of(tree) as copy:
        (copy / "tests" / "test_x.py").write_text(f"def test():\n    {FATES[fate] or 'pass'}\n")
        found, _ = mutation.fate(launcher, copy, mutation.Module("npllama/x.py", "test_x"), limit, window)
    assert found == outcome


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("child", ["that ended", "that runs"])
def test_the_time_of_a_session_includes_its_children(child):
    burn = "import time\nwhile time.process_time() < 0.5: pass\n"
    burn += "print(1, flush=True); input()" if child == "that runs" else "print(1)"
    run = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    with process:
        assert process.stdout.readline() == "1\n"
        end = time.monotonic() + 60
        while mutation.processor_seconds(process.pid) < 0.5:  # once it has ended, if it does
            assert time.monotonic() < end
        process.communicate("\n\n")


GREEDY = {
    "memory": "bytearray(9 << 30)",
    "disk": "open('x', 'wb').truncate(2 << 30)",
    "files": "import shutil; shutil.rmtree('.'); raise SystemExit(1)",
}


@pytest.mark.parametrize("what", GREEDY)
def test_a_mutant_hurts_its_copy_alone(tree, launcher, what):
    before = sorted(tree.rglob("*"))
    with mutation.copy_of(tree) as copy:
        (copy / "tests" / "test_x.py").write_text(f"def test():\n    {GREEDY[what]}\n")
        assert mutation.fate(launcher, copy, mutation.Module("npllama/x.py", "test_x"), 120)[0] in ("failed", "crashed")
        assert not (copy / "x").exists() or (copy / "x").stat().st_size < 1 << 30
    assert sorted(tree.rglob("*")) == before


def test_the_page_counts_equivalent_survivors_apart():
    def mutant(change, outcome):
        return {"module": "npllama/a.py", "line": 3, "change": change, "outcome": outcome, "seconds": 1.0}

    results = {
        "command": "python tests/helpers/mutation.py --seed 7 --n 4",
        "date": "2026-01-01",
        "revision": "abc",
        "versions": ["NumPy 2"],
        "drawn": 5,
        "seconds": {"npllama/a.py": 1.25},
        "mutants": [
            mutant("x = a | b → x = a & b", "survived"),
            mutant("y = 1 → y = 2", "failed"),
            mutant("while y: → while not y:", "timeout"),
            mutant("z = 1 → z = 2", "survived"),
        ],
    }
    explained = {"equivalent": {"npllama/a.py: x = a | b → x = a & b": "b is empty"}, "open": {}}
    text = mutation.page(results, explained)
    assert "**4 of 5 drawn were run: 2 killed, 1 survived**, and 1 equivalent" in text
    assert "Of the others, 66.7 % were killed. The others were not run" in text
    assert "the time limit" not in mutation.page(results | {"drawn": 4}, explained)
    assert "| npllama/a.py | 1.2 | 4 | 2 | 1 | 1 | 1 |" in text
    survivors, equivalent = text.split("## Survivors")[1].split("## Equivalent mutants")
    assert "| npllama/a.py:3 | `z = 1` → `z = 2` |  |" in survivors
    assert "| npllama/a.py:3 | `x = a \\| b` → `x = a & b` | b is empty |" in equivalent


def test_after_the_tests_changed_survivors_run_again_and_killed_mutants_stay_killed(tmp_path):
    out = tmp_path / "out.json"
    assert mutation.earlier_results(out, {"digest": "abc", "revision": "a1"}) == ({}, {}, {})
    killed, survivor = (
        {"module": "npllama/a.py", "line": 3, "change": "", "key": key, "outcome": outcome, "revision": "a1"}
        for key, outcome in (("1", "failed"), ("2", "survived"))
    )
    mutation.write(out, {"digest": "abc", "seconds": {}, "mutants": [killed, survivor]})
    for digest, revision, stand, again in (("abc", "a1", "12", ""), ("other", "a1", "1", "2"), ("abc", "a2", "1", "2")):
        _, stands, others = mutation.earlier_results(out, {"digest": digest, "revision": revision})
        assert ("".join(stands), "".join(others)) == (stand, again)


def test_the_digest_is_of_the_code_and_the_tests(tree):
    before = mutation.digest(tree)
    with mutation.copy_of(tree) as copy:
        assert mutation.digest(copy) == before
        (copy / "tests" / "test_x.py").write_text("# more")
        assert mutation.digest(copy) != before
