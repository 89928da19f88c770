"""Show npllama's own code, tables, and pictures in one style, in the notebooks of docs/course/.

    source(ops.softmax)                       the function's code, without its docstring
    table(["token", "id"], rows)              a table
    bars(labels, values)                      a bar chart
    heat_map(weights, queries, keys)          a matrix as colours

The results have `_repr_markdown_`, which a notebook calls: Jupyter need not be imported.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .grading import grade
from .lesson import Cell, Table, table_markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLUE", "GREEN", "ORANGE", "bars", "grade", "heat_map", "pictures", "source", "table"]

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # distinguishable for colour-blind readers


class Shown:
    """Markdown that a notebook shows as the value of a cell."""

    def __init__(self, markdown: str):
        self.markdown = markdown

    def _repr_markdown_(self) -> str:
        return self.markdown

    def __repr__(self) -> str:
        return self.markdown


def source(*functions: Callable) -> Shown:
    """Show the code of functions as it is in npllama, without docstrings: the notebook's text explains more."""
    return Shown("```python\n" + "\n\n\n".join(map(code_of, functions)) + "\n```")


def code_of(function: Callable) -> str:
    """Return a function's code without its docstring."""
    code = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    lines, (definition, *_) = code.splitlines(), ast.parse(code).body
    first = definition.body[0] if isinstance(definition, ast.FunctionDef | ast.ClassDef) else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Shown:
    """Show rows as a table; numbers have about four digits."""
    plain = [[cell.item() if isinstance(cell, np.generic) else cell for cell in row] for row in rows]
    return Shown(table_markdown(Table(tuple(columns), tuple(map(tuple, plain)))))


def pictures() -> None:
    """Set matplotlib's style: readable on a phone, and with a white background in dark mode too."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.figsize": (6.4, 3.2), "figure.dpi": 110, "figure.facecolor": "white", "font.size": 11})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})
    plt.rcParams.update({"axes.formatter.min_exponent": 4})  # a logarithmic axis says 0.01 and 100, not 10⁻² and 10²


def bars(labels: Sequence[str], values: Sequence[float] | np.ndarray, title: str = "", unit: str = "") -> Axes:
    """Draw a horizontal bar for each value, the first on top."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6.4, 0.8 + 0.3 * len(labels)))
    axes.barh(range(len(labels)), values, color=BLUE)
    axes.set_yticks(range(len(labels)), drawable(labels))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    return axes


def drawable(labels: Sequence[str]) -> list[str]:
    """Write labels so that no `$` starts a formula and no ␣ hangs below the text: a space is a raised dot."""
    return [label.replace("$", r"\$").replace("␣", "·") for label in labels]


def heat_map(x: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str = "", unit: str = "") -> Axes:
    """Draw a matrix as colours with its rows and columns named; zero is white, masked numbers are grey."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6.4, 5))
    shown = np.ma.masked_invalid(x)
    limit = float(np.abs(shown).max())
    least, colours = (-limit, "RdBu_r") if shown.min() < 0 else (0.0, "Blues")
    axes.set_facecolor("#bbbbbb")
    image = axes.imshow(shown, cmap=colours, vmin=least, vmax=limit)
    axes.set_xticks(range(len(columns)), drawable(columns), rotation=90 if len(columns) > 8 else 0)
    axes.set_yticks(range(len(rows)), drawable(rows))
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label=unit)
    return axes
