"""Write docs/conformance-matrix.md from the recorded measurements: `python docs/make_conformance.py`."""

from __future__ import annotations

import itertools
from pathlib import Path

from npllama.golden.conformance.cases import cases
from npllama.golden.conformance.suite import recorded
from npllama.golden.mistakes import MISTAKES

PAGE = Path(__file__).with_name("conformance-matrix.md")
HEAD = """\
# Conformance: which case catches which mistake

Made by `python docs/make_conformance.py` from measurements in float32. A mistake counts as caught if its result differs from
the right one by more than twice the tolerance. [conformance.md](conformance.md) explains the vectors and their use.

"""


def text() -> str:
    """Return the page."""
    caught: dict[str, list[str]] = {}
    for path, measured in recorded().items():
        for name in measured.catches:
            caught.setdefault(name, []).append(path)
    lines = [
        f"{len(caught)} mistakes, each caught by at least one of {len(cases())} cases; every case catches at least one.",
        "",
    ]
    lines += ["## The mistakes", "", "| mistake | what is wrong | caught by |", "|---|---|---|"]
    for name in (name for name in MISTAKES if name in caught):
        by_level = itertools.groupby(caught[name], lambda path: path.partition("/")[0])
        count = ", ".join(f"{level}: {len(list(paths))}" for level, paths in by_level)
        lines.append(f"| `{name}` | {_cell(MISTAKES[name].sentence)} | `{caught[name][0]}` ({count}) |")
    lines += ["", "## The cases", "", "| case | purpose | mistakes |", "|---|---|---|"]
    for path, case in cases().items():
        names = recorded()[path].catches
        shown = ", ".join(f"`{name}`" for name in names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)
        lines.append(f"| `{path}` | {_cell(case.purpose)} | {shown} |")
    return HEAD + "\n".join(lines) + "\n"


def _cell(sentence: str) -> str:
    return sentence.replace("|", "\\|").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
