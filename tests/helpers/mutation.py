"""Mutants of the numeric core: one small change each, which a quick selection of tests should notice.

    pip install mutmut                                          # for its operators, on libcst
    python tests/helpers/mutation.py --seed 1 --n 600 --jobs 2
    python tests/helpers/mutation.py --seed 1 --n 600 --jobs 2 --minutes 30    # as far as it comes; run again to go on
    python tests/helpers/mutation.py --seed 1 --n 600 --list    # draw, and test none
    python tests/helpers/mutation.py --render                   # docs/mutation.md again, after explaining survivors

Writes docs/mutation.json, and docs/mutation.md from it and from the explanations in mutation_explained.json beside this file,
after each mutant, so that what was interrupted goes on where it was, as long as neither the code nor the tests changed.
Torch and the test packages must be installed. Each mutant lives in a copy of the tracked files, with a home and temporary
files of its own, and has limits of memory, file size and the processor's time: a busy machine kills none. Left out is what no
test of numbers can notice, or what any test would: annotations, strings, what a `raise` says, zip's strict, constants that
decide speed alone, None for a value.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, PAGE = ROOT / "docs" / "mutation.json", ROOT / "docs" / "mutation.md"
EXPLAINED = Path(__file__).with_name("mutation_explained.json")  # a survivor's change -> why no test notices it


@dataclass(frozen=True)
class Module:
    """A module of the core and the tests that are to notice."""

    path: str
    tests: str
    k: str = ""  # pytest's -k: without tests that take long or are about something else
    only: tuple[str, ...] = ()  # the functions and classes to mutate; all if none is named


WEIGHTS = "test_weights or test_ops or 1threads and not 20000 and not two_threads or known_answers or half_a_step or smallest"
LINEAR = "multiplied_as_one or (test_weights or 1threads or 3threads) and not two_threads and not 20000"
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
# What was found by measuring speed, and decides that alone.
TUNING = {"FEW_ROWS", "IN_PLACE", "FEW_TILE", "SHARED", "TILE", "TOKENS", "SHORT_ROW", "PREFILL_CHUNK"}
MEMORY, FILE_BYTES = 8 << 30, 1 << 30  # of address space, of which torch alone reserves several gigabytes
# Seconds of the processor that a mutant may take: so many times what the tests take on right code, and so many more.
FACTOR, EXTRA = 5, 20
# It waits for nothing if all its processes together take less of the processor than IDLE seconds in WINDOW seconds.
WINDOW, IDLE = 90, 0.5


@dataclass
class Mutant:
    """One change, and what became of it."""

    module: str
    line: int
    change: str  # "before → after", the lines that differ
    outcome: str = ""  # "failed", "crashed", "timeout" (it loops or waits for ever) or "survived"
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------------------------- mutants


class Site:
    """A node of a module's syntax tree and what mutmut's operators make of it."""

    def __init__(self, tree, node, line: int, variants: list):
        self.tree, self.node, self.line, self.variants = tree, node, line, variants


def sites(source: str, only: tuple[str, ...] = ()) -> list[Site]:
    """Return every place of a module that an operator of mutmut changes, in the order of the text."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation import mutators

    left_out = {mutators.operator_string, mutators.operator_assignment}
    operators = [(kind, operator) for kind, operator in mutators.mutation_operators if operator not in left_out]
    wrapper = MetadataWrapper(cst.parse_module(source))
    positions, found = wrapper.resolve(PositionProvider), []

    class Visitor(cst.CSTVisitor):
        inside = 0

        def on_visit(self, node: cst.CSTNode) -> bool:
            if isinstance(node, cst.Annotation | cst.Raise | cst.Import | cst.ImportFrom):
                return False
            if isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", "") in TUNING:
                return False
            if isinstance(node, cst.Arg) and is_strict(node):
                return False
            self.inside += self.named(node)
            if self.inside or not only:
                variants = [new for kind, operator in operators if isinstance(node, kind) for new in operator(node)]
                variants = [new for new in variants if not (isinstance(node, cst.Call) and pointless(node, new))]
                if variants:
                    found.append(Site(wrapper.module, node, positions[node].start.line, variants))
            return True

        def on_leave(self, node: cst.CSTNode) -> None:
            self.inside -= self.named(node)

        def named(self, node: cst.CSTNode) -> bool:
            return isinstance(node, cst.FunctionDef | cst.ClassDef) and node.name.value in only

    def pointless(node: cst.Call, new: cst.CSTNode) -> bool:
        """Whether an argument became None, which any test that runs the line notices, or zip's `strict` is gone."""
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
    """Yield n mutants of different places with their source, each place as likely as any other."""
    rng = random.Random(seed)
    sources = {module: (root / module.path).read_text(encoding="utf-8") for module in modules}
    places = [(module, site) for module, source in sources.items() for site in sites(source, module.only)]
    rng.shuffle(places)
    for module, site in places:
        if n == 0:
            return
        before, after = sources[module], site.tree.deep_replace(site.node, rng.choice(site.variants)).code
        if same_program(before, after):
            continue
        n -= 1
        yield module, Mutant(module.path, site.line, change(before, after)), after
    if n:
        print(f"{n} fewer than asked for: the modules have no more places", file=sys.stderr)


def same_program(before: str, after: str) -> bool:
    """Whether a change is none, or not Python."""
    try:
        return ast.dump(ast.parse(before)) == ast.dump(ast.parse(after))
    except SyntaxError:
        return True


def change(before: str, after: str) -> str:
    """Return the lines that differ as one line: `size = n // 2 → size = n * 2`."""
    diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[3:]
    sides = [" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+"]
    return " → ".join(sides)


# ----------------------------------------------------------------------------------------------------- in a copy of the tree

# What runs in the copy: pytest with limits of its own. No core files: a mutant may well crash.
LAUNCHER = """
import resource, sys
for name, value in (("AS", {memory}), ("FSIZE", {file_bytes}), ("CORE", 0), ("CPU", {seconds})):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value + 5 if name == "CPU" else value))
import npllama, npllama_convert, os
for package in (npllama, npllama_convert):
    assert os.path.realpath(package.__file__).startswith(os.getcwd() + os.sep), package.__file__
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


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
    """Give a copy of a snapshot, for one mutant to spoil."""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder).resolve() / "tree"
        shutil.copytree(tree, copy, symlinks=True)
        (copy.parent / "home").mkdir()
        (copy.parent / "tmp").mkdir()
        yield copy


def fate(copy: Path, module: Module, limit: float, window: float = WINDOW) -> tuple[str, float]:
    """Run a module's tests in a copy: the outcome, as Mutant has it, and the seconds that it took.

    limit is in seconds of the processor. A test that waits for ever takes none of them: it ends after window seconds of that.
    """
    launcher = LAUNCHER.format(memory=MEMORY, file_bytes=FILE_BYTES, seconds=math.ceil(limit))
    command = [sys.executable, "-B", "-c", launcher, "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += [f"tests/{name}.py" for name in module.tests.split()] + (["-k", module.k] if module.k else [])
    home, temporary = str(copy.parent / "home"), str(copy.parent / "tmp")
    environment = {**os.environ, "PYTHONPATH": str(copy), "HOME": home, "TMPDIR": temporary, "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with open(copy.parent / "output", "wb") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = None
            while status is None:
                before = processor_seconds(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(window)
                if status is None and processor_seconds(process.pid) - before < IDLE:
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):  # its children too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcomes = {None: "timeout", -signal.SIGXCPU: "timeout", 0: "survived", 1: "failed", 2: "failed"}
    return outcomes.get(status, "crashed"), time.monotonic() - started


def processor_seconds(session: int) -> float:
    """Return the processor's time of a session's processes and of their children that ended (Linux; elsewhere 0)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()  # from the third on: proc(5)
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def right_code(tree: Path, module: Module) -> float:
    """Return the seconds of the processor that a module's tests take on right code; SystemExit if they don't pass."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with copy_of(tree) as copy:
        outcome, _ = fate(copy, module, limit=600)
        if outcome != "survived":
            output = (copy.parent / "output").read_text(errors="replace")
            raise SystemExit(f"{module.path}: its tests fail without a mutant ({outcome}):\n{output[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def digest(tree: Path) -> str:
    """Return the sha256 of the code and the tests in a snapshot: the same, and so is every outcome."""
    sha = hashlib.sha256()
    for path in sorted(tree.rglob("*.py")):
        if path.is_relative_to(tree / "npllama_convert"):  # convert/ again
            continue
        sha.update(f"{path.relative_to(tree)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sha.hexdigest()


# --------------------------------------------------------------------------------------------------------------------- the page


def page(results: dict, explained: dict[str, str]) -> str:
    """Return docs/mutation.md: what was run, how many mutants of each module were killed, and each survivor."""
    mutants = [Mutant(**mutant) for mutant in results["mutants"]]
    alive = [mutant for mutant in mutants if mutant.outcome == "survived"]
    share = 100 * (1 - len(alive) / max(len(mutants), 1))
    equivalent = sum(mutant.change in explained for mutant in alive)
    rest = results["drawn"] - len(mutants)
    lines = [
        "# Mutants",
        "",
        "A mutant is the numeric core with one small change, such as `<` for `<=`, `-` for `+`, one more in a number, or an",
        "argument left out. It is killed when a test fails. [A script](../tests/helpers/mutation.py) draws mutants at",
        "random from a recorded seed, by mutmut's operators, and runs a few seconds of its module's tests on each, in a copy",
        "of the tree. It wrote this page.",
        "",
        "```console",
        "$ pip install mutmut",
        f"$ {results['command']}",
        "```",
        "",
        f"{results['date']}, revision {results['revision']}: {', '.join(results['versions'])}.",
        "",
        f"**{len(mutants) - len(alive)} of {len(mutants)} killed ({share:.1f} %)**; {equivalent} of the {len(alive)} survivors "
        "are explained below."
        + (f" They are the first {len(mutants)} of {results['drawn']} drawn: the time was up." if rest else "")
        + " Seconds are the processor's, for the tests on right code. Killed by time are those that loop or wait for ever.",
        "",
        "| module | seconds | drawn | killed | of these by time | survived |",
        "|---|---|---|---|---|---|",
    ]
    for path, seconds in results["seconds"].items():
        of_it = [mutant.outcome for mutant in mutants if mutant.module == path]
        alive_here, slow = of_it.count("survived"), of_it.count("timeout")
        lines.append(f"| {path} | {seconds:.1f} | {len(of_it)} | {len(of_it) - alive_here} | {slow} | {alive_here} |")
    lines += ["", "## Survivors", "", "| where | change | why no test notices |", "|---|---|---|"]
    for mutant in alive:
        change = mutant.change.replace("|", "\\|")
        before, _, after = change.partition(" → ")
        reason = explained.get(mutant.change, "").replace("|", "\\|")
        lines.append(f"| {mutant.module}:{mutant.line} | `{before}` → `{after}` | {reason} |")
    return "\n".join(lines) + "\n"


def render() -> None:
    """Write docs/mutation.md of the last results and the explanations that there are now."""
    explained = json.loads(EXPLAINED.read_text(encoding="utf-8")) if EXPLAINED.exists() else {}
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8")), explained), encoding="utf-8")


def write(out: Path, results: dict) -> None:
    """Write the results, and the page of docs/mutation.json."""
    out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if out == RESULTS:
        render()


def place(mutant: Mutant) -> tuple[str, int, str]:
    """Return what tells a mutant from the others of a draw."""
    return mutant.module, mutant.line, mutant.change


def earlier_results(out: Path, results: dict) -> dict:
    """Return the results that an earlier run of the same draw of the same code and tests has left; none are empty."""
    earlier = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if any(earlier.get(key) != results[key] for key in ("command", "versions", "digest")):
        return {"seconds": {}, "mutants": []}
    return earlier


def git_revision() -> str:
    """The commit of the working tree, marked if it has changes."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Draw, test, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n", type=int, default=600, help="how many mutants")
    parser.add_argument("--modules", nargs="+", metavar="PART", help="only modules whose path has one of these in it")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after that; run again to go on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results as JSON")
    parser.add_argument("--list", action="store_true", help="draw, and test none")
    parser.add_argument("--render", action="store_true", help="write docs/mutation.md again and end")
    args = parser.parse_args()
    if args.render:
        render()
        return 0
    modules = tuple(m for m in CORE if not args.modules or any(part in m.path for part in args.modules))
    if args.list:
        for number, (_, mutant, _) in enumerate(draw(ROOT, modules, args.seed, args.n)):
            print(f"{number:4} {mutant.module}:{mutant.line}: {mutant.change}")
        return 0
    packages = ("numpy", "pytest", "mutmut", "libcst")
    results = {
        "command": f"python tests/helpers/mutation.py --seed {args.seed} --n {args.n}"
        + (f" --modules {' '.join(args.modules)}" if args.modules else ""),
        "date": time.strftime("%Y-%m-%d"),
        "revision": git_revision(),
        "versions": [f"Python {platform.python_version()}", *(f"{p} {importlib.metadata.version(p)}" for p in packages)],
    }
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = snapshot(ROOT, Path(folder))
        results["digest"] = digest(tree)
        drawn = dict(enumerate(draw(tree, modules, args.seed, args.n)))
        results["drawn"] = len(drawn)
        earlier = earlier_results(args.out, results)
        known = {place(mutant): mutant for mutant in (Mutant(**m) for m in earlier["mutants"])}
        done = {number: known[key] for number, (_, mutant, _) in drawn.items() if (key := place(mutant)) in known}
        processor = {}
        for module in modules:
            processor[module] = earlier["seconds"].get(module.path) or right_code(tree, module)
            print(f"{processor[module]:.1f} s of the processor: {module.path}", flush=True)
        results["seconds"] = {module.path: round(took, 1) for module, took in processor.items()}
        lock = threading.Lock()

        def run(number: int) -> None:
            if time.monotonic() > end:
                return
            module, mutant, source = drawn[number]
            with copy_of(tree) as copy:
                (copy / module.path).write_text(source, encoding="utf-8")
                mutant.outcome, seconds = fate(copy, module, processor[module] * FACTOR + EXTRA)
            mutant.seconds = round(seconds, 1)
            where = f"{mutant.module}:{mutant.line}: {mutant.change}"
            print(f"{number:4} {mutant.outcome:8} {mutant.seconds:5} s  {where}", flush=True)
            with lock:
                done[number] = mutant
                write(args.out, {**results, "mutants": [asdict(done[number]) for number in sorted(done)]})

        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                list(pool.map(run, [number for number in drawn if number not in done]))
            except BaseException:  # such as Ctrl-C: those that run end, the others don't begin
                pool.shutdown(cancel_futures=True)
                raise
    alive = sum(mutant.outcome == "survived" for mutant in done.values())
    print(f"{len(done) - alive} of {len(done)} killed; {len(drawn)} drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
