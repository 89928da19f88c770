"""Convert our docstrings, which are plain text to be read in the source, to reStructuredText for the site's reference.

Sentences flow; formulas and shapes keep their lines; a name and its explanation in columns become a table.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

GAP = re.compile(r"(?<=\S) {2,}(?=\S)")  # spaces that align a column, or that separate shapes from a sentence
SHAPES = re.compile(r"(\w[\w, ]* )?\[.*\] -> .*")  # x [..., D], weight [D] -> [..., D]
FORMULA = re.compile(r"\w+ = .*")


def to_rst(text: str) -> str:
    """Convert a docstring, block by block."""
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", text.strip("\n")) if block.strip())


def _block(block: str) -> str:
    lines = block.splitlines()
    if block.startswith("|"):
        lines = re.sub(r"\n(?!\|)\s*", " ", block).splitlines()  # a row may go on in the next line
        cells = [line.strip().removeprefix("|").removesuffix("|") for line in lines]
        rows = [[cell.strip() for cell in re.split(r"(?<=\s)\|(?=\s|$)", line)] for line in cells]
        return _table(rows[:1] + rows[2:], header=True)
    if block.startswith("  "):
        key = [re.split(r" {2,}", line.strip()) for line in lines]
        if all(len(row) % 2 == 0 and all(re.fullmatch("[A-Z]", letter) for letter in row[::2]) for row in key):
            return _table([[f"`{row[i]}`", row[i + 1]] for row in key for i in range(0, len(row), 2)])  # the dimension key
        return _literal(textwrap.dedent(block))
    if rows := _rows(lines):
        return _table([[f"`{name}`", GAP.sub("; ", text)] for name, text in rows])
    if len(lines) == 1 and FORMULA.fullmatch(block):
        return _formula(lines)
    if any(map(_is_set, lines[1:])) or (_is_set(lines[0]) and not _is_sentence(lines[0])):
        end = 1 + max(i for i, line in enumerate(lines) if _is_set(line))
        return "\n\n".join(filter(None, [_formula(lines[:end]), _prose("\n".join(lines[end:]))]))
    sentence, *shape = re.split(r" {4,}", lines[0], maxsplit=1)  # `A sentence.    [..., T]`
    return "\n\n".join([_prose("\n".join([sentence, *lines[1:]])), *map(_formula, ([line] for line in shape))])


def _rows(lines: list[str]) -> list[tuple[str, str]]:
    """Return a name and a text for each line of a block whose texts begin in one column, else nothing."""
    gap = GAP.search(lines[0])
    if gap is None or len(lines) == 1:
        return []
    rows: list[tuple[str, str]] = []
    for line in lines:
        name, text = line[: gap.end()], line[gap.end() :]
        if not text or text.startswith(" ") or not name.endswith("  "):
            return []
        if name.strip():
            rows.append((name.strip(), text))
        else:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {text}")
    return rows


def _is_set(line: str) -> bool:
    """Return whether a line is a formula with its shapes, or shapes alone."""
    return line.startswith("  ") or GAP.search(line) is not None or SHAPES.fullmatch(line) is not None


def _is_sentence(line: str) -> bool:
    """Return whether what precedes the gap is a sentence: `A sentence.    [..., T]`, unlike `y = x Wᵀ        x [..., in]`."""
    return GAP.split(line)[0].endswith((".", ":"))


def _formula(lines: Iterable[str]) -> str:
    """Keep a formula's lines, and put shapes that follow it on a line of their own."""
    text = re.sub(r"(?<=\S) {8}(?=\S)", "\n", "\n".join(lines))
    return _literal(text.replace("`", ""), "   :class: formula\n")


def _literal(text: str, options: str = "") -> str:
    return f".. code-block:: text\n{options}\n{textwrap.indent(text, '   ')}"


def _table(rows: Iterable[list[str]], header: bool = False) -> str:
    cells = [f"   {'*' if i == 0 else ' '} - {_prose(cell)}".rstrip() for row in rows for i, cell in enumerate(row)]
    return "\n".join([".. list-table::", *(["   :header-rows: 1"] if header else []), "", *cells])


def _prose(text: str) -> str:
    """Escape everything that reStructuredText would interpret, except `code`."""
    parts = re.split(r"`([^`]+)`", text)
    parts[::2] = [re.sub(r"([\\*_|`])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"\\ ``{code.strip()}``\\ " for code in parts[1::2]]
    text = "".join(parts).removeprefix("\\ ").removesuffix("\\ ").replace("::\n", ":\\:\n")
    return re.sub(r"^(?=\.\.|:|[A-Za-z0-9]+[.)] )", r"\\", text)  # a comment, a field or a list
