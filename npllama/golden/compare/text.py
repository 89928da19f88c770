"""Format a comparison for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable

from .comparison import Comparison, Row
from .names import place

NEIGHBOURS = 3  # rows shown on either side of the first failure
CLOSEST = 5  # rows shown when nothing failed
COLUMNS = ("activation", "max abs", "rms", "error", "floor", "x floor", "local", "cosine", "ulp", "")
RED, GREEN, BOLD, PLAIN = "\033[31m", "\033[32m", "\033[1m", "\033[0m"


def text(comparison: Comparison, everything: bool = False, colour: bool = False) -> str:
    """Return the verdict, hints on its cause, and a table: around the first failure, or of everything."""

    def paint(code: str, s: str) -> str:
        return f"{code}{s}{PLAIN}" if colour else s

    lines = [paint(BOLD + (GREEN if comparison.equal else RED), comparison.verdict)]
    lines += [f"hint: {hint}" for hint in comparison.hints]
    if culprits := in_layers(comparison.wrong_by_themselves):
        lines.append(f"wrong by themselves, given the candidate's own inputs: {culprits}")
    lines += logits_lines(comparison)
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    lines += ["", *table(comparison, everything, paint), "", judged_by(comparison)]
    return "\n".join(lines)


def logits_lines(comparison: Comparison) -> list[str]:
    """Describe the effect of the logits' difference on the generated tokens, in the pass where it is largest."""
    found = [(row.name, m) for row in comparison.rows if (m := row.metrics) and m.kl is not None]
    if not found:
        return []
    name, m = max(found, key=lambda named: named[1].kl or 0.0)
    worst = f", the worst of {len(found)} passes" if len(found) > 1 else ""
    numbers = f"KL divergence {m.kl:.2g} nats, the same first choice {m.top1:.1%}, the same five {m.top5:.1%}"
    return [f"{name}{worst}: {numbers}"]


def judged_by(comparison: Comparison) -> str:
    """Describe the rule of judgement in a line."""
    if comparison.tolerance is not None:
        return f"judged by |candidate - reference| <= {comparison.tolerance[0]:g} + {comparison.tolerance[1]:g} * |reference|"
    noise = comparison.noise
    several, one = noise.limits
    times = f"{several:g} times" if several == one or not noise.local else f"{several:g} times, one operation by {one:g} times,"
    rule = f"judged by {times} the noise floor of {noise.title} ({noise.source})"
    return f"{rule}; errors are relative, at the worst token"


def in_layers(names: list[str]) -> str:
    """Join names, with the layers of each: "attention.q_rope, attention.k_rope in layers 0-3"."""
    layers: dict[str, list[int]] = {}
    for name in names:
        here = place(name)
        kind = here.kind if here.layer is not None else name
        layers.setdefault(kind, [])
        if here.layer is not None and here.layer not in layers[kind]:
            layers[kind].append(here.layer)
    by_layers: dict[str, list[str]] = {}
    for kind, found in layers.items():
        by_layers.setdefault(ranges(sorted(found)), []).append(kind)
    return "; ".join(
        ", ".join(kinds) + (f" in layer{'s' * (not where.isdecimal())} {where}" if where else "")
        for where, kinds in by_layers.items()
    )


def ranges(numbers: list[int]) -> str:
    """Write numbers as ranges: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)


def shown_rows(comparison: Comparison, everything: bool) -> list[int | None]:
    """Return the indices of the rows to show, in order; None stands for those left out."""
    rows = comparison.rows
    if everything:
        return list(range(len(rows)))
    if (first := comparison.first) is not None:
        at = rows.index(first)
        chosen = list(range(max(0, at - NEIGHBOURS), min(len(rows), at + NEIGHBOURS + 1)))
    else:
        chosen = sorted(sorted(range(len(rows)), key=lambda i: -ratio(rows[i]))[:CLOSEST])
    shown: list[int | None] = []
    before = -1
    for i in chosen:
        shown += [None] * (i != before + 1) + [i]
        before = i
    return shown + [None] * (before != len(rows) - 1)


def ratio(row: Row) -> float:
    """Return the larger multiple of the floor of the two judgements."""
    return max((judged.ratio for judged in (row.judged, row.local) if judged), default=math.inf)


def table(comparison: Comparison, everything: bool, paint: Callable[[str, str], str]) -> list[str]:
    """Return the rows in aligned columns."""
    shown = shown_rows(comparison, everything)
    rows = [cells(comparison.rows[i], comparison) if i is not None else None for i in shown]
    widths = [max(len(row[i]) for row in [COLUMNS, *filter(None, rows)]) for i in range(len(COLUMNS))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(
            cell.rjust(w) if 0 < i < len(COLUMNS) - 1 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    lines = [line(COLUMNS)]
    for row in rows:
        if row is None:
            lines.append("...")
        else:
            lines.append(line(row) if row[-1] == "ok" else paint(RED, line(row)))
    if None in rows:
        lines.append(f"{counts(comparison)}; --all shows every one")
    return lines


def counts(comparison: Comparison) -> str:
    """Count the activations, those that differ, and those on one side only: "105 activations, 3 different, 20 missing"."""
    missing = len(comparison.missing)
    different = sum(not row.passed for row in comparison.rows) - missing
    return f"{len(comparison.rows)} activations, {different} different" + (f", {missing} missing" if missing else "")


def status(row: Row, comparison: Comparison) -> str:
    """Return one row's last column."""
    if row.passed or row.problem:
        return row.problem or "ok"
    return "wrong by itself" if row.local and comparison.is_culprit(row) else "different"


def cells(row: Row, comparison: Comparison) -> tuple[str, ...]:
    """Return one row's columns."""
    m, judged = row.metrics, row.judged
    if m is None or judged is None:
        return (row.name, *[""] * (len(COLUMNS) - 2), status(row, comparison))
    return (
        row.name,
        f"{m.max_abs:.1e}",
        f"{m.rms:.1e}",
        f"{judged.error:.1e}",
        f"{judged.floor:.0e}",
        f"{judged.ratio:.2g}",
        f"{row.local.ratio:.2g}" if row.local else "-",
        f"{m.cosine:.6f}",
        f"{m.max_ulp:.3g}",
        status(row, comparison),
    )
