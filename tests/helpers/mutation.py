"""Run mutants of the numeric core: one small change each, which a quick selection of tests should detect.

    pip install mutmut                                          # for its operators, on libcst
    python tests/helpers/mutation.py --seed 1 --n 600 --jobs 2
    python tests/helpers/mutation.py --seed 1 --n 600 --jobs 2 --minutes 30    # as many as that allows; run again to continue
    python tests/helpers/mutation.py --seed 1 --n 600 --list    # draw, and test none
    python tests/helpers/mutation.py --render                   # write docs/mutation.md again, after explaining survivors

Writes docs/mutation.json after each mutant, and docs/mutation.md from it and from mutation_explained.json in this folder. The
same command again continues where it stopped. After changes of code or tests it runs the new mutants and those that survived; a
killed one stays killed, with the revision that killed it. --afresh runs all of them.

Torch and the test packages must be installed. Each mutant runs in a copy of the tracked files, with a home and temporary
files of its own, and with limits of memory, file size and processor time: a busy machine kills none. Changes that no test of
numbers can detect, or that any test would, are left out: annotations, strings, the message of a `raise`, zip's strict,
constants that decide speed alone, None for a value, -2 for -1 in reshape() (NumPy infers any negative size).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, PAGE = ROOT / "docs" / "mutation.json", ROOT / "docs" / "mutation.md"
# "equivalent" and "open", each: module and change of a survivor -> why it is equivalent, or why no test kills it yet
EXPLAINED = Path(__file__).with_name("mutation_explained.json")


@dataclass(frozen=True)
class Module:
    """A module of the core and the tests that should detect its mutants."""

    path: str
    tests: str
    k: str = ""  # pytest's -k: without tests that take long or are about something else
    only: tuple[str, ...] = ()  # the functions and classes to mutate; all if none is named


WEIGHTS = "test_weights or test_ops or 1threads and not 20000 and not two_threads or known_answers or half_a_step or smallest"
LINEAR = (
    "multiplied_as_one or (test_weights or 1threads or 3threads or 2threads and every_path) and not two_threads and not 20000"
)
FAST = "tiled or padding or separate_ways or together or shared_from or eight or input or test_scope or test_model"
SHARDS = "joined or order_of_their or bad_tensor or lost or too_many or differ or belong or tied"
CORE = (
    Module("npllama/model.py", "test_model test_scope"),
    Module("npllama/ops.py", "test_ops test_model"),
    Module("npllama/cache.py", "test_cache test_model test_generation"),
    Module("npllama/scope.py", "test_scope test_model"),
    Module("npllama/sampling.py", "test_sampling", "not hugging_face and not torch"),
    Module("npllama/generation.py", "test_generation test_lookup"),
    Module("npllama/engine/weights.py", "engine/test_weights engine/test_linear engine/test_int8 test_ops", WEIGHTS),
    Module("npllama/engine/linear.py", "engine/test_linear engine/test_weights engine/test_layout engine/test_grouped", LINEAR),
    Module("npllama/engine/layout.py", "engine/test_layout"),
    Module("npllama/engine/fast.py", "engine/test_linear test_scope test_model", FAST),
    Module("npllama/engine/grouped.py", "engine/test_grouped", "not info"),
    Module("npllama/engine/ranks/shares.py", "engine/ranks/test_shares"),
    Module("npllama/engine/threads.py", "engine/test_threads", "not any_moment"),
    Module("npllama/golden/precision.py", "golden/test_precision", "not hf-wide and not hf-narrow and not ml_dtypes"),
    Module("convert/huggingface.py", "convert/test_convert_hf", "interleaved or bit_for_bit", ("interleaved_order",)),
    Module(
        "convert/conversion.py",
        "convert/test_conversion convert/test_convert_hf convert/test_convert_meta convert/test_convert_sources",
        "test_conversion or interleaved or tied or as_fit or mapped_tensor or bit_for_bit and (grouped or odd)",
        ("Tensor", "same_bits", "tie"),
    ),
    Module(
        "convert/meta.py",
        "convert/test_convert_meta",
        SHARDS,
        ("_find_shards", "_join", "_rows_across", "_check_number_of_shards", "assemble"),
    ),
)
# Constants that were found by measuring speed, and affect nothing else.
TUNING = {"FEW_ROWS", "IN_PLACE", "FEW_TILE", "SHARED", "TILE", "QUERIES", "SHARES", "TOKENS", "SHORT_ROW", "PREFILL_CHUNK"}
MEMORY, FILE_BYTES = 8 << 30, 1 << 30  # of address space, of which torch alone reserves several gigabytes
# Processor seconds that a mutant may take: this multiple of the tests' time on unchanged code, plus this many seconds.
FACTOR, EXTRA = 5, 20
# It hangs if all its processes together use the processor for less than IDLE seconds in WINDOW seconds.
WINDOW, IDLE = 90, 0.5


@dataclass
class Mutant:
    """One change, and its outcome."""

    module: str
    line: int
    change: str  # "before → after", the lines that differ
    key: str = ""  # the hash that it was drawn by
    outcome: str = ""  # "failed", "crashed", "timeout" (it loops or waits for ever) or "survived"
    seconds: float = 0.0
    revision: str = ""  # of the tests that decided


# ------------------------------------------------------------------------------------------------------------------- mutants


class Site:
    """A place in a source: its line, the functions and classes around it, and mutmut's changes of the source."""

    def __init__(self, line: int, around: str, variants: list[Callable[[], str]]):
        self.line, self.around, self.variants = line, around, variants


def sites(source: str, only: tuple[str, ...] = ()) -> list[Site]:
    """Return every place of a module that an operator of mutmut changes, in the order of the text."""
    import libcst as cst
    from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, PositionProvider
    from mutmut.mutation import mutators

    left_out = {mutators.operator_string, mutators.operator_assignment}
    operators = [(kind, operator) for kind, operator in mutators.mutation_operators if operator not in left_out]
    wrapper = MetadataWrapper(cst.parse_module(source))
    positions, spans, found = wrapper.resolve(PositionProvider), wrapper.resolve(ByteSpanPositionProvider), []
    text = source.encode()

    def replaced(node: cst.CSTNode, new: cst.CSTNode) -> str:
        """Return the source with another node: libcst's deep_replace() takes as long as a test."""
        start, stop = spans[node].start, spans[node].start + spans[node].length
        old = text[start:stop].decode()
        if getattr(new, "lpar", ()):  # the span is without the parentheses
            new = new.with_changes(lpar=[], rpar=[])
        code = wrapper.module.code_for_node(new).strip()
        before, after = old[: len(old) - len(old.lstrip())], old[len(old.rstrip()) :]
        return text[:start].decode() + before + code + after + text[stop:].decode()

    class Visitor(cst.CSTVisitor):
        def __init__(self) -> None:
            super().__init__()
            self.around: list[str] = []
            self.sizes: set[cst.CSTNode] = set()  # the 1 of reshape(-1)

        def on_visit(self, node: cst.CSTNode) -> bool:
            if isinstance(node, cst.Annotation | cst.Raise | cst.Import | cst.ImportFrom):
                return False
            if isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", "") in TUNING:
                return False
            if isinstance(node, cst.Arg) and is_strict(node):
                return False
            if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute) and node.func.attr.value == "reshape":
                self.sizes |= {arg.value.expression for arg in node.args if isinstance(arg.value, cst.UnaryOperation)}
            if isinstance(node, cst.FunctionDef | cst.ClassDef):
                self.around.append(node.name.value)
            if (not only or not set(only).isdisjoint(self.around)) and node not in self.sizes:
                variants = [new for kind, operator in operators if isinstance(node, kind) for new in operator(node)]
                variants = [new for new in variants if not (isinstance(node, cst.Call) and pointless(node, new))]
                if variants:
                    made = [functools.partial(replaced, node, new) for new in variants]
                    found.append(Site(positions[node].start.line, ".".join(self.around), made))
            return True

        def on_leave(self, node: cst.CSTNode) -> None:
            if isinstance(node, cst.FunctionDef | cst.ClassDef):
                self.around.pop()

    def pointless(node: cst.Call, new: cst.CSTNode) -> bool:
        """Return whether an argument became None, which any test that runs the line detects, or zip's `strict` is gone."""
        if not isinstance(new, cst.Call):
            return False
        if len(new.args) < len(node.args):
            return any(map(is_strict, node.args)) and not any(map(is_strict, new.args))
        return any(a is not b and getattr(b.value, "value", "") == "None" for a, b in zip(node.args, new.args, strict=True))

    def is_strict(arg: cst.Arg) -> bool:
        return arg.keyword is not None and arg.keyword.value == "strict"

    wrapper.module.visit(Visitor())
    return found


def draw(root: Path, modules: tuple[Module, ...], seed: int, n: int) -> Iterator[tuple[Module, Mutant, str]]:
    """Yield n mutants of different places with their source, each place as likely as any other.

    The places are drawn in the order of a hash of the seed, the line's text and the functions around it, so that a change of
    the code leaves the draw elsewhere as it is.
    """
    sources = {module: (root / module.path).read_text(encoding="utf-8") for module in modules}
    places = {}
    for module, source in sources.items():
        lines = source.splitlines()
        for site in sites(source, module.only):
            text = f"{seed}\0{module.path}\0{site.around}\0{lines[site.line - 1].strip()}"
            key = next(key for i in itertools.count() if (key := sha256(f"{text}\0{i}")) not in places)
            places[key] = module, site
    for key in sorted(places):
        if n == 0:
            return
        module, site = places[key]
        before, after = sources[module], site.variants[int(sha256(key), 16) % len(site.variants)]()
        if same_program(before, after):
            continue
        n -= 1
        yield module, Mutant(module.path, site.line, change(before, after), key[:16]), after
    if n:
        print(f"{n} fewer than asked for: the modules have no more places", file=sys.stderr)


def sha256(text: str) -> str:
    """Return the sha256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def same_program(before: str, after: str) -> bool:
    """Return whether a change has no effect, or isn't Python."""
    try:
        return dumped(before) == ast.dump(ast.parse(after))
    except SyntaxError:
        return True


@functools.cache
def dumped(source: str) -> str:
    """Return the dumped syntax tree of a module (cached, since many mutants share it)."""
    return ast.dump(ast.parse(source))


def change(before: str, after: str) -> str:
    """Return the lines that differ as one line: `size = n // 2 → size = n * 2`."""
    diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[3:]
    sides = [" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+"]
    return " → ".join(sides)


# ----------------------------------------------------------------------------------------------------- in a copy of the tree

# Forks a process for each line of standard input and runs pytest in it, in a copy of the tree, with limits of its own. It has
# imported what the tests import from elsewhere, which takes longer than most of them. No core files: a mutant may well crash.
LAUNCHER = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]  # not the current one: Python's -P, which 3.10 lacks
import contextlib, importlib, json, os, pathlib, resource, tempfile, traceback
import pytest
for name in {imports}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

class Quick:
    \"\"\"Run tests in the order of the seconds that they take on right code, which job["quick"] holds, or records.\"\"\"

    def __init__(self, path):
        self.path, self.seconds = pathlib.Path(path), {{}}
        self.known = self.path.exists()
        if self.known:
            self.seconds = json.loads(self.path.read_text())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: int(20 * self.seconds.get(item.nodeid, 0)))  # in steps: fixtures are shared by neighbours

    def pytest_runtest_logreport(self, report):
        if not self.known:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self):
        if not self.known:
            self.path.write_text(json.dumps(self.seconds))

def run(job):
    os.setsid()
    for number, path in enumerate((os.devnull, job["output"], job["output"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    for name, value in (("AS", {memory}), ("FSIZE", {file_bytes}), ("CORE", 0), ("CPU", job["seconds"])):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value + 5 if name == "CPU" else value))
    os.environ.update(job["environment"])
    tempfile.tempdir = None  # what was imported may have asked for it
    sys.dont_write_bytecode = not job["compile"]
    os.chdir(job["tree"])
    sys.path.insert(0, job["tree"])
    import npllama, npllama_convert
    for package in (npllama, npllama_convert):
        assert os.path.realpath(package.__file__).startswith(job["tree"] + os.sep), package.__file__
    return int(pytest.main(job["arguments"], plugins=[Quick(job["quick"])]))

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = run(json.loads(line))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
    _, status, used = os.wait4(pid, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
"""
IMPORTS = ("numpy", "torch", "transformers.models.llama.modeling_llama", "gguf", "safetensors", "ml_dtypes")


class Launcher:
    """The process of LAUNCHER; it ends with its standard input."""

    def __init__(self) -> None:
        code = LAUNCHER.format(memory=MEMORY, file_bytes=FILE_BYTES, imports=IMPORTS)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )

    def run(self, job: dict, window: float) -> tuple[int | None, float]:
        """Run one process; return its status, None if it hung, and the processor seconds that it took."""
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        pid, idle = int(self._process.stdout.readline()), False
        try:
            while not idle:
                before = processor_seconds(pid)
                if select.select([self._process.stdout], [], [], window)[0]:
                    break
                idle = processor_seconds(pid) - before < IDLE
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children too
                os.killpg(pid, signal.SIGKILL)
        status, seconds = self._process.stdout.readline().split()
        return None if idle else int(status), float(seconds)

    def close(self) -> None:
        """End the process."""
        with self._process:  # closes its pipes and waits
            pass


def snapshot(root: Path, folder: Path) -> Path:
    """Copy the tracked files, with the folder convert/ under the name that it is installed by too."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)
    (folder / "npllama_convert").symlink_to("convert")
    return folder


@contextlib.contextmanager
def copy_of(tree: Path) -> Iterator[Path]:
    """Provide a copy of a snapshot for one mutant."""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder).resolve() / "tree"
        shutil.copytree(tree, copy, symlinks=True)
        (copy.parent / "home").mkdir()
        (copy.parent / "tmp").mkdir()
        yield copy


def fate(
    launcher: Launcher, copy: Path, module: Module, limit: float, window: float = WINDOW, quick: Path | None = None
) -> tuple[str, float]:
    """Run a module's tests in a copy; return the outcome, one of Mutant's, and the processor seconds.

    limit is in processor seconds. A test that hangs uses none: it ends after window seconds of real time.
    quick is a file with the seconds of each test, the quickest first; it is written if it doesn't exist.
    """
    arguments = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    arguments += [f"tests/{name}.py" for name in module.tests.split()]
    folder = copy.parent
    job = {
        "tree": str(copy),
        "arguments": arguments + (["-k", module.k] if module.k else []),
        "output": str(folder / "output"),
        "quick": str(quick or folder / "quick"),
        "compile": quick is not None and not quick.exists(),
        "seconds": math.ceil(limit),
        "environment": {"PYTHONPATH": str(copy), "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")},
    }
    status, seconds = launcher.run(job, window)
    outcomes = {None: "timeout", -signal.SIGXCPU: "timeout", 0: "survived", 1: "failed", 2: "failed"}
    return outcomes.get(status, "crashed"), seconds


def processor_seconds(session: int) -> float:
    """Return the processor's time of a session's processes and of their children that ended (Linux; elsewhere 0)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()  # from the third on: proc(5)
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def right_code(launcher: Launcher, tree: Path, module: Module, quick: Path | None = None) -> float:
    """Return the seconds of the processor that a module's tests take on right code; SystemExit if they don't pass.

    Their bytecode goes to the tree, and with it into the mutants' copies: compiling everything takes longer than most tests.
    """
    with copy_of(tree) as copy:
        outcome, seconds = fate(launcher, copy, module, limit=600, quick=quick)
        if outcome != "survived":
            output = (copy.parent / "output").read_text(errors="replace")
            raise SystemExit(f"{module.path}: its tests fail without a mutant ({outcome}):\n{output[-3000:]}")
        for cache in copy.rglob("__pycache__"):
            shutil.copytree(cache, tree / cache.relative_to(copy), dirs_exist_ok=True)
    return seconds


def digest(tree: Path) -> str:
    """Return the sha256 of the code and the tests in a snapshot; equal hashes mean equal outcomes."""
    sha = hashlib.sha256()
    for path in sorted(tree.rglob("*.py")):
        if path.is_relative_to(tree / "npllama_convert"):  # convert/ again
            continue
        sha.update(f"{path.relative_to(tree)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sha.hexdigest()


# --------------------------------------------------------------------------------------------------------------------- the page


def page(results: dict, explained: dict[str, dict[str, str]]) -> str:
    """Return docs/mutation.md: the run, how many mutants of each module were killed, and each survivor."""
    mutants = [Mutant(**mutant) for mutant in results["mutants"]]
    alive = [mutant for mutant in mutants if mutant.outcome == "survived"]
    equal = [mutant for mutant in alive if reason_for(mutant) in explained["equivalent"]]
    killed, judged = len(mutants) - len(alive), len(mutants) - len(equal)
    rest = results["drawn"] - len(mutants)
    lines = [
        "# Mutants",
        "",
        "A mutant is the numeric core with one small change, such as `<` for `<=`, `-` for `+`, a number raised by one, or an",
        "argument left out. It is killed when a test fails. [A script](../tests/helpers/mutation.py) draws mutants by a hash",
        "of the place and a recorded seed, with mutmut's operators, and runs a few seconds of its module's tests on each, in a",
        "copy of the tree. It wrote this page.",
        "",
        "```console",
        "$ pip install mutmut",
        f"$ {results['command']}",
        "```",
        "",
        f"{results['date']}, revision {results['revision']}: {', '.join(results['versions'])}.",
        "",
        f"**{len(mutants)} of {results['drawn']} drawn were run: {killed} killed, {len(alive) - len(equal)} survived**, and "
        f"{len(equal)} equivalent: they change no result. Of the others, {100 * killed / max(judged, 1):.1f} % were killed."
        + (" The others were not run: the time limit was reached." if rest else ""),
        "",
        "Killed mutants are not run again when tests change, but survivors are; mutation.json has each one's revision.",
        "Seconds are the processor time of the tests on unchanged code. Mutants killed by time loop or wait forever.",
        "",
        "| module | seconds | drawn | killed | of these by time | equivalent | survived |",
        "|---|---|---|---|---|---|---|",
    ]
    for path, seconds in results["seconds"].items():
        of_it = [mutant for mutant in mutants if mutant.module == path]
        outcomes = [mutant.outcome for mutant in of_it]
        same, slow = sum(mutant in equal for mutant in of_it), outcomes.count("timeout")
        left = outcomes.count("survived")
        lines.append(f"| {path} | {seconds:.1f} | {len(of_it)} | {len(of_it) - left} | {slow} | {same} | {left - same} |")
    others = [mutant for mutant in alive if mutant not in equal]
    lines += ["", "## Survivors", "", "| where | change | what no test needs yet |", "|---|---|---|"]
    lines += [row(mutant, explained["open"]) for mutant in others]
    lines += ["", "## Equivalent mutants", "", "| where | change | why it changes no result |", "|---|---|---|"]
    lines += [row(mutant, explained["equivalent"]) for mutant in equal]
    return "\n".join(lines) + "\n"


def reason_for(mutant: Mutant) -> str:
    """Return the key of a mutant's explanation."""
    return f"{mutant.module}: {mutant.change}"


def row(mutant: Mutant, reasons: dict[str, str]) -> str:
    """Return a survivor's row of the page."""
    before, _, after = mutant.change.replace("|", "\\|").partition(" → ")
    reason = reasons.get(reason_for(mutant), "").replace("|", "\\|")
    return f"| {mutant.module}:{mutant.line} | `{before}` → `{after}` | {reason} |"


def render() -> None:
    """Write docs/mutation.md from the last results and the explanations."""
    results, explained = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, EXPLAINED))
    PAGE.write_text(page(results, explained), encoding="utf-8")


def write(out: Path, results: dict) -> None:
    """Write the results, and the page of docs/mutation.json."""
    out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if out == RESULTS:
        render()


def earlier_results(out: Path, results: dict) -> tuple[dict[str, float], dict[str, Mutant], dict[str, Mutant]]:
    """Return the seconds of an earlier run, its mutants whose outcome stands, and the survivors to run again, by their keys.

    One that was killed stays so, and a survivor as long as neither code nor tests changed since it was run.
    """
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"seconds": {}, "mutants": []}
    mutants = {mutant["key"]: Mutant(**mutant) for mutant in earlier["mutants"]}
    same = results["revision"] if earlier.get("digest") == results["digest"] else None
    again = {key: mutant for key, mutant in mutants.items() if mutant.outcome == "survived" and mutant.revision != same}
    return earlier["seconds"], {key: mutant for key, mutant in mutants.items() if key not in again}, again


def git_revision() -> str:
    """Return the commit of the working tree, marked if it has changes."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Draw, test, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n", type=int, default=600, help="how many mutants")
    parser.add_argument("--modules", nargs="+", metavar="PART", help="only mutants of modules with one of these in the path")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after that; run again to go on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results as JSON")
    parser.add_argument("--afresh", action="store_true", help="run all mutants, also those that were killed before")
    parser.add_argument("--list", action="store_true", help="draw, and test none")
    parser.add_argument("--render", action="store_true", help="write docs/mutation.md again and end")
    args = parser.parse_args()
    if args.render:
        render()
        return 0
    if args.list:
        for number, (_, mutant, _) in enumerate(draw(ROOT, CORE, args.seed, args.n)):
            print(f"{number:4} {mutant.module}:{mutant.line}: {mutant.change}")
        return 0
    packages = ("numpy", "pytest", "mutmut", "libcst")
    results = {
        "command": f"python tests/helpers/mutation.py --seed {args.seed} --n {args.n}",
        "date": time.strftime("%Y-%m-%d"),
        "revision": git_revision(),
        "versions": [f"Python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in packages)],
    }
    end = time.monotonic() + 60 * args.minutes
    launchers: queue.Queue[Launcher] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder, contextlib.ExitStack() as stack:
        tree = snapshot(ROOT, Path(folder).resolve() / "tree")
        quick = {module: tree.parent / f"quick{i}" for i, module in enumerate(CORE)}
        results["digest"] = digest(tree)
        drawn = list(draw(tree, CORE, args.seed, args.n))
        results["drawn"] = len(drawn)
        seconds, stands, again = ({}, {}, {}) if args.afresh else earlier_results(args.out, results)
        done = {m.key: replace(stands[m.key], line=m.line) for _, m, _ in drawn if m.key in stands}
        left = [
            (module, mutant, source)
            for module, mutant, source in drawn
            if mutant.key not in done and any(part in module.path for part in args.modules or [""])
        ]
        for _ in range(args.jobs):
            launchers.put(Launcher())
            stack.callback(launchers.queue[-1].close)
        left.sort(key=lambda item: item[1].key not in again)  # the survivors first
        lock, measuring = threading.Lock(), threading.Lock()

        def record() -> None:
            results["seconds"] = {module.path: seconds[module.path] for module in CORE if module.path in seconds}
            mutants = again | done  # a survivor that was not run again is one
            write(args.out, {**results, "mutants": [asdict(mutants[m.key]) for _, m, _ in drawn if m.key in mutants]})

        def run(number: int) -> None:
            if time.monotonic() > end:
                return
            module, mutant, source = left[number]
            launcher = launchers.get()
            with measuring:
                if not quick[module].exists():
                    seconds[module.path] = round(right_code(launcher, tree, module, quick[module]), 1)
                    print(f"{seconds[module.path]:.1f} s of the processor: {module.path}", flush=True)
            with copy_of(tree) as copy:
                (copy / module.path).write_text(source, encoding="utf-8")
                limit = seconds[module.path] * FACTOR + EXTRA
                mutant.outcome, took = fate(launcher, copy, module, limit, quick=quick[module])
            launchers.put(launcher)
            mutant.seconds, mutant.revision = round(took, 1), results["revision"]
            where = f"{mutant.module}:{mutant.line}: {mutant.change}"
            print(f"{number:4} {mutant.outcome:8} {mutant.seconds:5} s  {where}", flush=True)
            with lock:
                done[mutant.key] = mutant
                record()

        record()
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                list(pool.map(run, range(len(left))))
            except BaseException:  # such as Ctrl-C: those that run end, the others don't begin
                pool.shutdown(cancel_futures=True)
                raise
    alive = sum(mutant.outcome == "survived" for mutant in done.values())
    print(f"{len(done) - alive} of {len(done)} killed; {len(drawn)} drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
