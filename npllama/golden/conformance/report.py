"""Format a report as text, JSON or a page."""

from __future__ import annotations

import html
import re
from pathlib import Path

from ..compare.report import write_as_its_name_says
from .grading import Report, Result
from .suite import VERSION

FORMAT = "npllama conformance report 1"
STYLE = """
:root { color-scheme: light dark; --bad: #c0262d; --good: #1a7f4b; --soft: #667; --line: #d8dbe0 }
@media (prefers-color-scheme: dark) { :root { --bad: #ff6b6b; --good: #4cc38a; --soft: #9aa3b0; --line: #33373f } }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 1.5rem 0 .3rem } .bad { color: var(--bad) } .good { color: var(--good) }
.soft { color: var(--soft) } table { border-collapse: collapse; width: 100% }
td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; vertical-align: top; overflow-wrap: anywhere }
td:first-child { white-space: nowrap } wbr { display: none }
td:nth-child(2) { white-space: nowrap }
@media (max-width: 600px) { body { padding: .75rem } td { padding: .2rem .3rem }
  td:first-child { white-space: normal; min-width: 7.5rem } wbr { display: inline } }
"""


def text(report: Report) -> str:
    """Return the verdict, and lines for each failure and for what was not run."""
    lines = [report.verdict]
    for result in report.failures:
        lines.append(f"FAILED {result.case.path}: {result.problem}")
        lines.append(f"  this case tests: {result.case.purpose}")
        lines += [f"  hint: {hint}" for hint in result.hints]
    if report.missing:
        lines.append(f"not run: {', '.join(report.missing)}")
    return "\n".join(lines)


def as_dict(report: Report) -> dict[str, object]:
    """Return everything, for JSON."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "port": report.port,
        "profile": report.profile,
        "verdict": report.verdict,
        "passed": not report.failures,
        "cases": [
            {
                "case": result.case.path,
                "operation": result.case.operation,
                "result": _word(result),
                "problem": result.problem,
                "purpose": result.case.purpose,
                "hints": list(result.hints),
            }
            for result in report.results
        ],
    }


def _word(result: Result) -> str:
    return "passed" if result.passed else "failed" if result.failed else "not run"


def page(report: Report) -> str:
    """Return one self-contained page: no other files, no request to the network."""
    e = html.escape
    parts = [f'<h1 class="{"bad" if report.failures else "good"}">{e(report.verdict)}</h1>']
    parts.append(f'<p class="soft">{e(report.port)}, conformance suite version {VERSION}</p>')
    for level in report.levels:
        rows = []
        for result in report.of_level(level):
            word = _word(result)
            more = "".join(f"<br>{e(line)}" for line in (result.problem, *(f"Hint: {hint}" for hint in result.hints)) if line)
            kind = {"passed": "good", "failed": "bad"}.get(word, "soft")
            path = re.sub(r"([/_])", r"\1<wbr>", e(result.case.path))  # where a narrow screen may break it
            rows.append(f'<tr><td>{path}<td class="{kind}">{word}<td>{e(result.case.purpose)}{more}')
        parts.append(f"<h2>{e(level)}</h2>\n<table>\n" + "\n".join(rows) + "\n</table>")
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
    head += f"<title>Conformance</title>\n<style>{STYLE}</style>\n"
    return head + "\n".join(parts) + "\n</html>\n"


def write_report(report: Report, path: Path | str) -> None:
    """Write x.json or x.html. Raises ValueError for another ending, or when the file can't be written."""
    write_as_its_name_says(Path(path), lambda: as_dict(report), lambda: page(report))
