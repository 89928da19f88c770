"""Write a comparison to a file: JSON for machines, or a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from ...checkpoint.atomic import write_file
from .comparison import Comparison
from .html import page
from .judging import Judged
from .metrics import Metrics
from .text import judged_by

FORMAT = "npllama comparison 1"


def as_dict(comparison: Comparison) -> dict[str, object]:
    """Return everything, for JSON. A number that is not finite is the string "inf", "-inf" or "nan"."""
    first = comparison.first
    return {
        "format": FORMAT,
        "verdict": comparison.verdict,
        "equal": comparison.equal,
        "first": first and first.name,
        "hints": comparison.hints,
        "wrong_by_themselves": comparison.wrong_by_themselves,
        "missing": [row.name for row in comparison.missing],
        "warnings": comparison.warnings,
        "reference": comparison.reference,
        "candidate": comparison.candidate,
        "precision": comparison.precision,
        "judged_by": judged_by(comparison),
        "limit": None if comparison.tolerance is not None else comparison.noise.limits.several,
        "activations": [
            {
                "name": row.name,
                "passed": row.passed,
                "problem": row.problem,
                **{
                    key: _plain(part)
                    for key, part in (("metrics", row.metrics), ("accumulated", row.judged), ("local", row.local))
                },
            }
            for row in comparison.rows
        ],
    }


def _plain(part: Metrics | Judged | None) -> dict[str, object] | None:
    if part is None:
        return None
    return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in vars(part).items()}


def write_report(comparison: Comparison, path: Path | str) -> None:
    """Write x.json or x.html. Raises ValueError for another ending, or when the file can't be written."""
    write_as_its_name_says(Path(path), lambda: as_dict(comparison), lambda: page(comparison))


def write_as_its_name_says(path: Path, values: Callable[[], object], page: Callable[[], str]) -> None:
    """Write x.json of the values or x.html of the page. Raises ValueError for another ending, or when it can't be written."""
    if path.suffix == ".json":
        content = json.dumps(values(), indent=1, allow_nan=False) + "\n"
    elif path.suffix == ".html":
        content = page()
    else:
        raise ValueError(f"{path}: expected a report that ends in .json or .html")
    write_file(path, content.encode())
