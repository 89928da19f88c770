"""Grade a port's results case by case: passed, failed and why, or not run."""

from __future__ import annotations

import runpy
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import printable, reason, shown
from ..mistakes import MISTAKES
from ..precision import profile
from .cases import PROFILES, Case, cases
from .config_files import vector_of
from .judging import problem
from .operations import OPERATIONS, DoesNotApply, Outputs, Program
from .suite import Expected, SuiteError, built_in, expected, is_for, read_array, read_suite

MOST_HINTS = 3


@dataclass(frozen=True)
class Result:
    """Result of one case: passed, failed with a problem, or not run, with neither."""

    case: Expected
    passed: bool
    problem: str | None = None
    hints: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Return whether there was a result, and it was wrong."""
        return self.problem is not None


@dataclass
class Report:
    """Results of one port in one rounding profile."""

    port: str
    profile: str
    results: list[Result] = field(default_factory=list)

    @property
    def failures(self) -> list[Result]:
        """Return the results that failed."""
        return [result for result in self.results if result.failed]

    @property
    def missing(self) -> list[str]:
        """Return the operations of which some case was not run."""
        return list(dict.fromkeys(r.case.operation for r in self.results if not r.passed and not r.failed))

    @property
    def exit_status(self) -> int:
        """Return 0 if all passed, 1 if some failed."""
        return 1 if self.failures else 0

    def of_level(self, level: str) -> list[Result]:
        """Return the results of one level."""
        return [result for result in self.results if result.case.level == level]

    @property
    def levels(self) -> list[str]:
        """Return the levels of the cases that were graded."""
        return list(dict.fromkeys(result.case.level for result in self.results))

    @property
    def verdict(self) -> str:
        """Return the levels passed, in one line."""
        passed, rest = [], []
        for level in self.levels:
            results = self.of_level(level)
            n, failed, missing = (
                len(results),
                sum(r.failed for r in results),
                sum(not r.passed and not r.failed for r in results),
            )
            if not failed and not missing:
                passed.append(level)
            elif missing == n:
                rest.append(f"{level} not run")
            else:
                run = f"{n - missing} of {n} cases run, " * bool(missing)
                rest.append(f"{level} {run}{failed} failed" if failed else f"{level} {run}all of them passed")
        return f"{self.profile}: levels passed: {', '.join(passed) or 'none'}" + "".join(f"; {part}" for part in rest)


def check(
    results: Path | str, vectors: Path | str | None = None, profile: str = "float32", levels: Collection[str] | None = None
) -> Report:
    """Grade what a port wrote. Raises ValueError where nothing can be graded."""
    folder = Path(results)
    if not folder.is_dir():
        raise SuiteError(f"{folder} is {'a file' if folder.exists() else 'missing'}, expected a folder of results")
    suite = built_in(levels) if vectors is None else read_suite(vectors, levels)

    def of(case: Expected) -> Outputs | str | None:
        found = {name: read_array(folder / case.path, name, y.shape) for name, y in case.outputs.items()}
        there = {name: x for name, x in found.items() if x is not None}
        if len(there) in (0, len(found)):
            return there or None
        return f"there is no output {next(name for name in found if name not in there)}"

    report = grade(str(folder), suite, of, profile)
    if not any(result.passed or result.failed for result in report.results):
        first = next(iter(report.results)).case
        where = folder / first.path / f"{next(iter(first.outputs))}.f32"
        raise SuiteError(f"{folder} holds no result of a case: expected {where} or another, as the vectors' README.md explains")
    return report


def run(file: Path | str, profile: str = "float32", levels: Collection[str] | None = None) -> Report:
    """Call the functions that a Python file defines under the operations' names. Raises ValueError where it defines none."""
    path = Path(file)
    try:
        namespace = runpy.run_path(str(path))
    except SystemExit:  # it would end this command, with a status that isn't a verdict
        raise SuiteError(f"{path} calls exit() when it is loaded, expected functions alone") from None
    except Exception as error:  # the file's code may raise anything
        raise SuiteError(f"{path}: {type(error).__name__}: {reason(error)}") from None
    functions = {name: value for name, value in namespace.items() if callable(value)}
    report = run_functions(str(path), functions, profile, levels)
    if not any(result.passed or result.failed for result in report.results):
        raise SuiteError(f"{path} defines no operation of the suite: expected {', '.join(report.missing)}, or some of these")
    return report


@dataclass(frozen=True)
class Check:
    """Test one case: calling it raises a ValueError that describes the problem."""

    path: str
    functions: Mapping[str, Callable[..., Any]]
    profile: str

    def __str__(self) -> str:
        return self.path

    def __call__(self) -> None:
        """Run the case."""
        case = expected(self.path)
        result = judged(case, call(self.functions, cases()[self.path], self.profile), self.profile)
        if result.failed:
            hints = "".join(f"; hint: {hint}" for hint in result.hints)
            raise SuiteError(f"{self.path}: {result.problem}; this case tests: {case.purpose}{hints}")


def checks(
    functions: Mapping[str, Callable[..., Any]], profile: str = "float32", levels: Collection[str] | None = None
) -> list[Check]:
    """Return a check for each case of the operations that are among the functions, for your own test suite.

    @pytest.mark.parametrize("check", checks(vars(mine)), ids=str)
    def test_conformance(check):
        check()

    Raises ValueError for an unknown profile, and if there is no check to return.
    """
    if profile not in PROFILES:
        raise SuiteError(f"profile is {shown(profile)}, expected {', '.join(PROFILES)}")
    known = [case for case in cases().values() if case.operation.name in functions and (not levels or case.level in levels)]
    found = [Check(case.path, functions, profile) for case in known if is_for(case.path, profile)]
    if not found:
        raise SuiteError(f"no function is an operation of the suite: expected {', '.join(OPERATIONS)}, or some of these")
    return found


def run_functions(
    port: str, functions: Mapping[str, Callable[..., Any]], profile: str = "float32", levels: Collection[str] | None = None
) -> Report:
    """Grade functions given by the operations' names; cases of other operations are not run."""
    return grade(port, built_in(levels), lambda case: call(functions, cases()[case.path], profile), profile)


def call(functions: Mapping[str, Callable[..., Any]], case: Case, name: str) -> Outputs | str | None:
    """Return a function's outputs for a case; or an error in one line; or None if there is no such function."""
    operation = case.operation
    if operation.name not in functions:
        return None
    try:
        with np.errstate(all="ignore"), tempfile.TemporaryDirectory() as folder:
            arguments = {**case.arguments}
            if "path" in arguments:
                _write(case.files, Path(folder))
                arguments["path"] = str(Path(folder) / arguments["path"])
            found = functions[operation.name](*operation.inputs(arguments, profile(name)))
    except NotImplementedError:
        return None
    except SystemExit:
        return "it called exit(), expected a result"
    except Exception as error:
        return printable(f"it raised {type(error).__name__}: {reason(error)}")
    if found is None:
        return "it returned nothing: is there a `return`?"
    if operation.name == "resolve_config" and isinstance(found, Mapping):
        try:
            found = vector_of(found)
        except (AttributeError, TypeError, ValueError) as error:
            return printable(f"it returned constants that aren't numbers: {reason(error)}")
    parts = found if len(operation.outputs) > 1 else (found,)
    if not isinstance(parts, tuple | list) or len(parts) != len(operation.outputs):
        return f"it returned {type(found).__name__}, expected {len(operation.outputs)} arrays: {', '.join(operation.outputs)}"
    try:
        arrays = [np.asarray(list(part.encode()) if isinstance(part, str) else part) for part in parts]
    except Exception as error:  # a library's array that NumPy can't read, as torch's bfloat16
        return printable(f"it returned {type(found).__name__}, which NumPy can't convert to an array: {reason(error)}")
    return dict(zip(operation.outputs, arrays, strict=True))


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def grade(port: str, suite: Iterable[Expected], results_of: Callable[[Expected], Outputs | str | None], profile: str) -> Report:
    """Judge each case that applies to the profile."""
    if profile not in PROFILES:
        raise SuiteError(f"profile is {shown(profile)}, expected {', '.join(PROFILES)}")
    report = Report(port, profile)
    for case in suite:
        if case.is_for(profile):
            report.results.append(judged(case, results_of(case), profile))
    if not report.results:
        raise SuiteError(f"no case of these levels is for the rounding profile {profile}")
    return report


def judged(case: Expected, found: Outputs | str | None, profile: str) -> Result:
    """Return the result of one case."""
    if found is None:
        return Result(case, passed=False)
    if isinstance(found, str):
        return Result(case, passed=False, problem=found)
    for name, y in case.outputs.items():
        if wrong := problem(found[name], y, case.tolerances[name][profile]):
            what = f"{name}: {wrong}" if len(case.outputs) > 1 else wrong
            return Result(case, passed=False, problem=what, hints=tuple(_hints(case, found, profile)))
    return Result(case, passed=True)


def _hints(case: Expected, found: Outputs, name: str) -> Iterator[str]:
    """Name the mistakes that give exactly these numbers."""
    mine = cases().get(case.path)
    if mine is None:  # of another version
        return
    n = 0
    for mistake in (MISTAKES[key] for key in case.catches if key in MISTAKES):
        try:
            with np.errstate(all="ignore"):
                predicted = mine.run(Program(profile(name), mistake))
        except (DoesNotApply, ValueError, IndexError):
            continue
        if all(_same(found[output], x, case, output, name) for output, x in predicted.items()):
            yield mistake.sentence
            n += 1
            if n == MOST_HINTS:
                return


def _same(found: np.ndarray, predicted: np.ndarray, case: Expected, output: str, name: str) -> bool:
    predicted = predicted.astype(np.float64)
    if found.shape != predicted.shape or found.dtype.kind not in "fiub":
        return False
    same_nan = np.array_equal(np.isnan(found.astype(np.float64)), np.isnan(predicted))
    return same_nan and problem(_without_nan(found), _without_nan(predicted), case.tolerances[output][name]) is None


def _without_nan(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return np.where(np.isnan(x), 0.0, x)
