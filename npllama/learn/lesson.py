"""Define a lesson, a list of steps, and format it for a terminal and as Markdown.

The modules that make the steps (walkthrough.py, tokenizer_lesson.py) decide nothing about the layout; this one only formats.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.resources
import inspect
import math
import os
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

Cell = str | int | float

ROOT = Path(__file__).resolve().parent.parent.parent  # the folder that holds the package; a Source's file is relative to it
LABEL_CELLS, HEADING_CELLS = 12, 8  # the width of a token's label, in terminal columns
INDENT = " " * 4
BOLD, DIM, PLAIN = "\033[1m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class Source:
    """A place in npllama's own code."""

    name: str  # "ops.rms_norm"
    file: str  # "npllama/ops.py"
    line: int

    @classmethod
    def of(cls, function: Callable) -> Source:
        """Return the place where a function or method is defined."""
        code = inspect.unwrap(function).__code__
        return cls(f"{_module(code)}.{function.__qualname__}", _relative(code), code.co_firstlineno)

    def calling(self, function: Callable) -> Source:
        """Return the nearest call of a function, at this line or above it in the same function; else this line."""
        body = _innermost(_syntax(self.file), self.line)
        calls = (node for node in ast.walk(body) if isinstance(node, ast.Call) and node.lineno <= self.line)
        named = (call.lineno for call in calls if _called(call) == function.__name__)
        return dataclasses.replace(self, line=max(named, default=self.line))

    @property
    def text(self) -> str:
        """Return the text of the line."""
        return _code(self.file).splitlines()[self.line - 1]

    def __str__(self) -> str:
        return f"{self.name} ({self.file}:{self.line})"


@functools.cache
def computed_at() -> dict[str, Source]:
    """Map each activation's name, without `layers.N.`, to the line of model.py that computes it and calls `see`.

    Reads the syntax tree, from forward() into each function that takes the scope.
    """
    file = "npllama/model.py"
    functions = {node.name: node for node in _syntax(file).body if isinstance(node, ast.FunctionDef)}

    def visit(function: str, prefix: str) -> Iterator[tuple[str, Source]]:
        for call in (node for node in ast.walk(functions[function]) if isinstance(node, ast.Call)):
            if (name := _called(call)) == "see":
                yield prefix + _text(call.args[0]), Source(f"model.{function}", file, call.lineno)
            elif name in functions:
                for below in map(_below, call.args):
                    if below is not None:
                        yield from visit(name, prefix + below)

    return dict(visit("forward", ""))


def _below(argument: ast.AST) -> str | None:
    """Return the prefix that a scope passed as an argument adds; None if the argument is not a scope."""
    if isinstance(argument, ast.Call) and _called(argument) == "under":
        return f"{_text(argument.args[0])}."
    is_scope = getattr(argument, "id", None) == "s" or (isinstance(argument, ast.Call) and _called(argument) == "in_layer")
    return "" if is_scope else None


def _text(argument: ast.AST) -> str:
    """Return the value of a string literal."""
    return ast.literal_eval(argument)


@functools.cache
def _syntax(file: str) -> ast.Module:
    return ast.parse(_code(file))


@functools.cache
def _code(file: str) -> str:
    inside = importlib.resources.files("npllama").joinpath(*Path(file).parts[1:])  # the package may be in a zip file
    return inside.read_text(encoding="utf-8")


def _innermost(tree: ast.Module, line: int) -> ast.AST:
    """Return the function that contains a line; the whole file if none does."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    around = [node for node in functions if node.lineno <= line <= (node.end_lineno or 0)]
    return max(around, key=lambda node: node.lineno) if around else tree


def _called(call: ast.Call) -> str | None:
    """Return the name of the function: `f` of f(x) and of module.f(x)."""
    return getattr(call.func, "id", getattr(call.func, "attr", None))


def _relative(code: CodeType) -> str:
    return Path(os.path.relpath(os.path.realpath(code.co_filename), ROOT)).as_posix()


def _module(code: CodeType) -> str:
    return Path(code.co_filename).stem


@dataclass(frozen=True)
class Table:
    """A small table; each row begins with its label. Floats are shown with about four digits."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Step:
    """One step of a lesson: a title, one to three sentences, and the numbers that show it."""

    title: str
    sentence: str
    formula: str = ""  # in plain text; several stand on lines of their own
    tex: tuple[str, ...] = ()  # the same for typesetting; none where the formula is code
    given: str = ""  # the values of the formula's constants
    shape: str = ""
    tables: tuple[Table, ...] = ()
    taps: tuple[str, ...] = ()  # the activations whose numbers are shown
    sources: tuple[Source, ...] = ()  # the functions that compute it
    called: Source | None = None  # the line of the forward pass that calls the first of them


# ------------------------------------------------------------------------------------------------------------------ terminal


def text(steps: Iterable[Step], width: int = 80, colour: bool = False) -> str:
    """Format the steps for a terminal of `width` columns."""
    return "\n\n".join(_step_text(i, step, width, colour) for i, step in enumerate(steps, start=1)) + "\n"


def _step_text(number: int, step: Step, width: int, colour: bool) -> str:
    paint = (lambda code, s: f"{code}{s}{PLAIN}") if colour else (lambda code, s: s)

    def wrapped(content: str, label: str = "") -> list[str]:
        """Wrap a text to the right of its label."""
        start = INDENT + (f"{label:<9}" if label else "")
        lines = []
        for line in content.splitlines():
            whole = re.sub(r"\[[^\[\]]*\]", lambda shape: shape[0].replace(" ", "\xa0"), line)  # a shape stays on one line
            lines += textwrap.wrap(whole, width - len(start), break_on_hyphens=False, break_long_words=False) or [""]
        first = INDENT + paint(DIM, f"{label:<9}") if label else INDENT
        return [(first if i == 0 else " " * len(start)) + line.replace("\xa0", " ") for i, line in enumerate(lines)]

    lines = [paint(BOLD, f"{number:>2}  {step.title}"), *wrapped(step.sentence), ""]
    if step.formula:
        lines += wrapped(",  ".join(filter(None, (step.formula, step.given))), "formula")
    if step.shape:
        lines += wrapped(step.shape, "shape")
    for table in step.tables:
        if lines[-1]:
            lines.append("")
        lines += wrapped(table.caption) if table.caption else []
        lines += [INDENT + line for line in table_text(table)]
    if step.tables and (step.taps or step.sources):
        lines.append("")
    if step.taps:
        lines += wrapped(", ".join(step.taps), "tap")
    for i, source in enumerate(step.sources):
        lines += wrapped(str(source), "" if i else "code") if i == 0 else [" " * 13 + str(source)]
    if step.called:
        lines.append(" " * 13 + f"called in {step.called}")
    while not lines[-1]:
        lines.pop()
    return "\n".join(lines)


def table_text(table: Table) -> list[str]:
    """Format a table as lines of aligned columns; columns of numbers and their headings are aligned on the right."""
    cells = [[show(cell) for cell in row] for row in table.rows]
    every = ([list(table.columns)] if any(table.columns) else []) + cells
    widths = [max(cell_width(row[i]) for row in every) for i in range(len(table.columns))]
    right = _numeric(table)
    lines = []
    for row in every:
        padded = []
        for cell, width, to_right in zip(row, widths, right, strict=True):
            spaces = " " * (width - cell_width(cell))
            padded.append(spaces + cell if to_right else cell + spaces)
        lines.append("  ".join(padded).rstrip())
    return lines


def _numeric(table: Table) -> list[bool]:
    """Find the columns that hold numbers."""
    return [any(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]


def show(cell: Cell) -> str:
    """Format a cell."""
    if isinstance(cell, str):
        return cell
    return str(cell) if isinstance(cell, int) else number(cell)


def number(x: float) -> str:
    """Format a number with about four digits: `0.0123`, `-12.3457`, `1.2e-07`, `-inf`."""
    if x == 0:
        return "0"
    if not math.isfinite(x):
        return str(x)
    if 1e-3 <= abs(x) < 1e4:
        return f"{x:.4f}" if abs(x) < 1000 else f"{x:.1f}"
    return f"{x:.1e}"


def cell_width(s: str) -> int:
    """Count the terminal columns of a text: Chinese characters take two, combining accents none."""
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in s
    )


def label(piece: str, cells: int = LABEL_CELLS) -> str:
    """Quote a token's piece for a table, so that its spaces are visible, and shorten a long one."""
    room = cells - 2
    if cell_width(piece) > room:
        kept = ""
        for c in piece:
            if cell_width(kept + c) > room - 1:
                break
            kept += c
        piece = kept + "…"
    return f'"{piece}"' if "'" in piece else f"'{piece}'"


# ------------------------------------------------------------------------------------------------------------------ Markdown


def markdown(steps: Sequence[Step], link: Callable[[Source], str] | None = None) -> str:
    """Format the steps as Markdown, with the formulas in TeX between `$$`, which GitHub, Jupyter and the site typeset.

    link  maps a source to its address, such as ../npllama/ops.py#L19; None: no links
    """
    parts = []
    for step in steps:
        parts += [f"### {_escaped(step.title)}", _escaped(step.sentence)]
        parts += [f"$$\n{tex}\n$$" for tex in step.tex]
        facts = [("formula", "" if step.tex else step.formula), ("given", step.given), ("shape", step.shape)]
        if given := [f"- {name}: `{' '.join(line.split())}`" for name, value in facts for line in value.splitlines()]:
            parts.append("\n".join(given))
        parts += [table_markdown(table) for table in step.tables]
        if step.sources:
            parts.append(_code_markdown(step, link))
    return "\n\n".join(parts) + "\n"


def _code_markdown(step: Step, link: Callable[[Source], str] | None) -> str:
    def place(source: Source) -> str:
        where = f"{source.file}:{source.line}"
        return f"`{source.name}` ({f'[{where}]({link(source)})' if link else where})"

    line = "Computed by " + ", ".join(map(place, step.sources))
    line += f", called in {place(step.called)}" if step.called else ""
    return line + ("; tap " + ", ".join(f"`{tap}`" for tap in step.taps) if step.taps else "") + "."


def table_markdown(table: Table) -> str:
    """Format a table in Markdown; columns of numbers are aligned on the right."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(map(_cell_markdown, cells))} |"

    def row_line(row: Sequence[Cell]) -> str:
        """Keep the label of a wide table's row on one line: the table scrolls."""
        first, *others = map(show, row)
        return line([first.replace(" ", "\xa0") if len(others) > 3 else first, *others])

    rule = "|" + "|".join("---:" if right else "---" for right in _numeric(table)) + "|"
    lines = [line(table.columns), rule, *map(row_line, table.rows)]
    return (_escaped(table.caption) + "\n\n" if table.caption else "") + "\n".join(lines)


def _cell_markdown(cell: str) -> str:
    """Escape a cell, and keep the spaces that Markdown would drop or break at."""
    return _escaped(cell).replace("' ", "'&nbsp;").replace("  ", "&nbsp; ").replace("\xa0", "&nbsp;")


def _escaped(s: str) -> str:
    """Replace the characters that Markdown interprets with entities, which every dialect supports."""
    return "".join(f"&#{ord(c)};" if c in "&\\`*_[]<>|#$~" else c for c in s)
