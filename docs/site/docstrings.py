"""Makes Markdown of our docstrings, which are plain text to be read in the source: sentences, formulas, aligned columns."""

from __future__ import annotations

import re
import textwrap

import griffe

GAP = re.compile(r"(?<=\S) {2,}(?=\S)")  # what is aligned, or set off from its sentence, by blanks
SHAPES = re.compile(r"(\w[\w, ]* )?\[.*\] -> .*")  # x [..., D], weight [D] -> [..., D]
FORMULA = re.compile(r"\w+ = .*")


def to_markdown(text: str) -> str:
    """Sentences flow; formulas and shapes stay as they stand; a name and its explanation in columns make a table."""
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", text.strip("\n")) if block.strip())


def _block(block: str) -> str:
    lines = block.splitlines()
    if block.startswith("|"):
        return block
    if block.startswith("  "):
        return _fenced(".text", textwrap.dedent(block))
    if rows := _rows(lines):
        return "\n".join(["| | |", "|---|---|", *(f"| `{name}` | {_escaped(GAP.sub('; ', text))} |" for name, text in rows)])
    if len(lines) == 1 and FORMULA.fullmatch(block):
        return _formula(lines)
    if any(map(_is_set, lines[1:])) or (_is_set(lines[0]) and not _is_sentence(lines[0])):
        end = 1 + max(i for i, line in enumerate(lines) if _is_set(line))
        return "\n\n".join([_formula(lines[:end]), _escaped("\n".join(lines[end:]))]).strip()
    sentence, *shape = re.split(r" {4,}", lines[0], maxsplit=1)  # `A sentence.    [..., T]`
    return "\n\n".join([_escaped("\n".join([sentence, *lines[1:]])), *map(_formula, ([line] for line in shape))])


def _rows(lines: list[str]) -> list[tuple[str, str]]:
    """A name and a text for each line of a block whose texts begin below each other, else nothing."""
    gap = GAP.search(lines[0])
    if gap is None or len(lines) == 1:
        return []
    rows, column = [], gap.end()
    for line in lines:
        name, text = line[:column], line[column:]
        if not text or text.startswith(" ") or not name.endswith("  "):
            return []
        if name.strip():
            rows.append((name.strip(), text))
        else:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {text}")
    return rows


def _is_set(line: str) -> bool:
    """A formula with its shapes, or shapes alone."""
    return line.startswith("  ") or GAP.search(line) is not None or SHAPES.fullmatch(line) is not None


def _is_sentence(line: str) -> bool:
    """`A sentence.    [..., T]`, unlike `y = x Wᵀ        x [..., in]`."""
    return GAP.split(line)[0].endswith((".", ":"))


def _formula(lines: list[str]) -> str:
    """As it stands, but that the shapes behind a formula get a line of their own."""
    return _fenced(".text .formula", re.sub(r"(?<=\S) {8}(?=\S)", "\n", "\n".join(lines)))


def _fenced(classes: str, text: str) -> str:
    return f"``` {{ {classes} }}\n{text}\n```"


def _escaped(prose: str) -> str:
    """No character of a sentence is Markdown's, but for `code`."""
    parts = re.split(r"(`[^`]*`)", prose)
    parts[::2] = [re.sub(r"([\\*_\[\]#|])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


class PlainText(griffe.Extension):
    """Gives mkdocstrings the Markdown of each docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called on every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
