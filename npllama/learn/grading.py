"""Write the exercise files, run the student's functions, and describe in one line what is wrong.

The student's code runs in this process, which is the student's own: it is guarded against mistakes, not against malice.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.atomic import write_file
from ..errors import NpllamaError, printable
from .exercises import EXERCISES, Exercise, find
from .exercises.exercise import Result

RTOL, ATOL = 1e-4, 1e-6  # float32 in any order of operations stays within it, and every known mistake is far outside

TEMPLATE = '''\
"""Exercise {number} of {total}: {name}

{statement}

To check it: npllama exercise check . {name}
"""

import numpy as np


def {name}({arguments}):
    raise NotImplementedError  # write it here
'''


@dataclass(frozen=True)
class Outcome:
    """The result of checking one exercise."""

    passed: bool
    line: str
    hint: str | None = None
    example: str | None = None  # lines: a small wrong call, its result, the expected one


class Unusable(NpllamaError):
    """Raised where the student's file gives no result to compare; the message is the line to print."""


class Raised(Unusable):
    """Raised where the student's function raises an exception.

    found  the results of the cases before
    call   a line about the arguments that it got
    """

    def __init__(self, message: str, found: list[np.ndarray], call: str):
        super().__init__(message)
        self.found, self.call = found, call


def file_name(exercise: Exercise) -> str:
    """Return the name of the student's file, `01_softmax.py`: files are listed in the order of the exercises."""
    return f"{EXERCISES.index(exercise) + 1:02}_{exercise.name}.py"


def start(folder: Path) -> list[Path]:
    """Write the missing exercise files and return their paths. Existing files stay unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, exercise in enumerate(EXERCISES, start=1):
        path = folder / file_name(exercise)
        text = TEMPLATE.format(
            number=number,
            total=len(EXERCISES),
            name=exercise.name,
            arguments=exercise.arguments,
            statement=exercise.statement,
        )
        if not os.path.lexists(path):  # never over the student's work
            write_file(path, text.encode())
            written.append(path)
    return written


def check(folder: Path, exercise: Exercise) -> Outcome:
    """Run the student's function on every case and compare its results with the reference's."""
    path = folder / file_name(exercise)
    if not path.is_file():
        return Outcome(False, f"{path.name} is missing: `npllama exercise start {folder}` writes it again")
    return _checked(exercise, lambda: load(path, exercise.name), path)


def grade(function: Callable[..., Result]) -> None:
    """Check a function by its name and print what `npllama exercise check` prints: for functions defined in a notebook."""
    exercise = find(function.__name__)
    print("\n".join(lines(exercise, _checked(exercise, lambda: function, Path(function.__code__.co_filename)))))


def _checked(exercise: Exercise, get: Callable[[], Callable[..., Result]], path: Path) -> Outcome:
    """Get the student's function, which is in the file of this path, and check it."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # NaN is reported in the outcome, not as NumPy's warning
            warnings.simplefilter("ignore")
            function = get()
            try:
                outcome = judge(exercise, results(exercise, function, path))
            except Raised as error:  # what it returned before may be wrong already, which says more
                outcome = first_wrong(exercise, error.found) or Outcome(False, str(error), example=error.call)
            if outcome.passed:
                return outcome
            return dataclasses.replace(outcome, example=counterexample(exercise, function) or outcome.example)
    except Unusable as error:
        return Outcome(False, str(error))


def lines(exercise: Exercise, outcome: Outcome) -> list[str]:
    """Format an outcome for people: a line, then a small failing input and a hint where there are some."""
    more = (outcome.example or "").splitlines() + ([f"hint: {outcome.hint}"] if outcome.hint else [])
    return [f"{exercise.name:<17} {outcome.line}", *(f"{'':<17} {line}" for line in more)]


def load(path: Path, name: str) -> Callable[..., Result]:
    """Load a function from the student's file, from its source: a compiled copy could be out of date within a second."""
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), namespace)
    except SyntaxError as error:
        where = f"line {error.lineno}" if error.lineno else path.name
        raise Unusable(f"Python can't read {where}: {one_line(error.msg)}") from None
    except (Exception, SystemExit) as error:
        raise Unusable(described(error, path)) from None
    function = namespace.get(name)
    if not callable(function):
        raise Unusable(f"there is no function {name} in {path.name}")
    return function


def results(exercise: Exercise, function: Callable[..., Result], path: Path) -> list[np.ndarray]:
    """Run the student's function on each case. Raises Unusable if a result is not an array, Raised if there is none."""
    found: list[np.ndarray] = []
    for case, arguments in enumerate(exercise.cases()):
        before = copy.deepcopy(arguments)
        try:
            result = function(*arguments)
        except NotImplementedError:
            raise Unusable("not done yet") from None
        except (Exception, SystemExit) as error:
            raise Raised(described(error, path), found, f"failing input: {given(exercise, case)}") from None
        if result is None:
            raise Unusable("it returned nothing: is there a `return`?")
        if not isinstance(result, np.ndarray | np.generic | int | float):
            raise Unusable(f"it returned a {type(result).__name__}, expected an array")
        if not exercise.in_place and not all(map(np.array_equal, before, arguments)):
            raise Unusable("it changed its argument: return a new array, since the caller still needs the old one")
        found.append(np.array(result))
    return found


def judge(exercise: Exercise, found: list[np.ndarray]) -> Outcome:
    """Compare results with the reference's: right, a known mistake, or wrong at the place of the largest difference."""
    if outcome := first_wrong(exercise, found):
        return outcome
    expected = outputs(exercise, exercise.reference)
    if expected[0].dtype.kind == "i":
        if wrong := {array.dtype.name for array in found if array.dtype.kind not in "iu"}:
            return Outcome(False, f"the numbers are right, but they are {wrong.pop()}, expected whole numbers")
        return Outcome(True, f"ok; npllama's own is {exercise.real}")
    allowed = {"float32", "float64"} if exercise.any_float else {"float32"}
    if wrong := {array.dtype.name for array in found} - allowed:
        return Outcome(
            False,
            f"the numbers are right, but they are {wrong.pop()}, expected float32",
            "np.sqrt(64), np.zeros(n), np.arange(n) / n and np.where(m, 0, -np.inf) are float64: use math.sqrt, pass a dtype",
        )
    return Outcome(True, f"ok; npllama's own is {exercise.real}")


def outputs(exercise: Exercise, function: Callable[..., Result], cases: list[tuple] | None = None) -> list[np.ndarray]:
    """Run the reference or a wrong function on each case; results are copied, since later calls may write into a cache's."""
    with np.errstate(all="ignore"):
        return [np.array(function(*arguments, *exercise.rest)) for arguments in (exercise.cases() if cases is None else cases)]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Check that two arrays have the same shape and, within rounding, the same numbers, NaN and infinities included."""
    numeric = a.dtype.kind in "fiub" and b.dtype.kind in "fiub"
    if "i" in a.dtype.kind + b.dtype.kind:  # ids and counts are right or wrong
        return numeric and np.array_equal(a, b)
    return numeric and a.shape == b.shape and np.allclose(a, b, RTOL, ATOL, equal_nan=True)


def first_wrong(exercise: Exercise, found: list[np.ndarray]) -> Outcome | None:
    """Find the first case whose numbers are wrong; None if there is none among the results, which may be fewer than cases."""
    for case, (f, e) in enumerate(zip(found, outputs(exercise, exercise.reference), strict=False)):
        if not same(f, e):
            return Outcome(False, difference(exercise, case, f, e), recognised(exercise, found, case))
    return None


def recognised(exercise: Exercise, found: list[np.ndarray], case: int) -> str | None:
    """Name the mistake that explains all results, or else those that explain the first wrong case, if they are one or two."""
    predicted = {hint: outputs(exercise, function) for hint, function in exercise.hints.items()}
    for hint, results in predicted.items():
        if all(map(same, found, results)):
            return hint
    here = [hint for hint, results in predicted.items() if same(found[case], results[case])]
    if not 0 < len(here) < 3 or found[case].dtype.kind != "f" or not np.isfinite(found[case]).any():  # others could be meant
        return None
    return f"{'; or: '.join(here)} (this explains case {case + 1}, not every case)"


def difference(exercise: Exercise, case: int, f: np.ndarray, e: np.ndarray) -> str:
    """Describe a wrong case in one line: its shape, its NaNs, or its largest difference."""
    which = given(exercise, case)
    if f.dtype.kind not in "fiub":
        return f"{which}: the result is {f.dtype}, expected float32"
    if f.shape != e.shape:
        return f"{which}: the result has shape {list(f.shape)}, expected {list(e.shape)}"
    if np.any(unexpected := np.isnan(f) & ~np.isnan(e)):
        return f"{which}: {np.count_nonzero(unexpected)} of {f.size} numbers are NaN"
    wide_f, wide_e = f.astype(np.float64), e.astype(np.float64)
    gap = np.subtract(wide_f, wide_e, out=np.zeros_like(wide_f), where=wide_f != wide_e)  # inf - inf would be NaN
    at = np.unravel_index(np.argmax(np.abs(gap)), gap.shape)
    digits = 15 if e.dtype.kind == "i" else 6
    place = f" at [{', '.join(map(str, at))}]" if at else ""
    return f"{which}: found {wide_f[at]:.{digits}g}{place}, expected {wide_e[at]:.{digits}g}"


def given(exercise: Exercise, case: int) -> str:
    """Name a case by its number and the shapes of its arguments."""
    cases = exercise.cases()
    return f"case {case + 1} of {len(cases)}, {exercise.name}({', '.join(map(shape_of, cases[case]))})"


def counterexample(exercise: Exercise, function: Callable[..., Result]) -> str | None:
    """Run the small inputs; show the first that fails, its result or exception, and what is expected; None if none fails."""
    expected = outputs(exercise, exercise.reference, exercise.small())
    for i, (arguments, right) in enumerate(zip(exercise.small(), expected, strict=True)):
        try:
            found = np.array(function(*arguments))
        except (Exception, SystemExit) as error:
            got = type(error).__name__
        else:
            if same(found, right):
                continue
            got = numbers(found)
        return f"small failing input: {call(exercise, i)}\ngot       {got}\nexpected  {numbers(right)}"
    return None


def call(exercise: Exercise, i: int) -> str:
    """Format the call with small input i as Python code; where it writes into a store, after the calls that filled it."""
    cases = exercise.small()
    if not exercise.in_place:
        return f"{exercise.name}({', '.join(map(literal, cases[i]))})"
    store = cases[i][0]
    calls = [f"{exercise.name}(store, {', '.join(map(literal, case[1:]))})" for case in cases[: i + 1] if case[0] is store]
    return "; ".join([f"store = {literal(store)}", *calls])


def literal(argument: object) -> str:
    """Format an argument as Python code, such as `np.float32([3, 4])`."""
    if not isinstance(argument, np.ndarray):
        return repr(argument)
    text = numbers(argument).replace("inf", "np.inf")
    return f"np.float32({text})" if argument.dtype == np.float32 else f"np.array({text})"


def numbers(x: np.ndarray) -> str:
    """Format an array as nested lists of numbers with up to six digits."""
    x = np.asarray(x)  # an element of an array of objects is not an array
    if x.size > 64:
        return f"{x.size} numbers of shape {list(x.shape)}"
    if x.ndim:
        return f"[{', '.join(map(numbers, x))}]"
    return f"{x:.6g}" if x.dtype.kind in "fiu" else one_line(str(x))


def shape_of(argument: object) -> str:
    """Format an array's shape, `[2, 3]`; another argument by its value."""
    return str(list(argument.shape)) if isinstance(argument, np.ndarray) else str(argument)


def described(error: BaseException, path: Path) -> str:
    """Describe an exception in one line: its type, the line of the student's file that raised it, its message."""
    if isinstance(error, SystemExit):
        return f"it called exit(){where(error, path)}: return the result instead"
    message = one_line(str(error))
    return f"{type(error).__name__}{where(error, path)}" + (f": {message}" if message else "")


def where(error: BaseException, path: Path) -> str:
    """Return ` in line 12`, the innermost line of the student's file that was running; empty if there is none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""


def one_line(text: str) -> str:
    """Remove a message's line breaks and shorten a long one."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= 200 else text[:199] + "…"
