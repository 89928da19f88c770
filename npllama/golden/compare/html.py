"""Write a comparison as one self-contained page: no other files, no request to the network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from .comparison import Comparison, Row
from .judging import Judged
from .names import place
from .text import counts, in_layers, judged_by, logits_lines, status

WIDTH, HEIGHT = 420, 170  # of a panel's plotting area
WARNINGS = 3  # shown at once: a trace that was edited has one for each activation
LEFT, TOP, BOTTOM = 46, 8, 104  # room for the numbers, and for the names below
STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #667; --paper: #fff; --line: #d8dbe0; --bad: #c0262d;
  --after: #a35c00; --good: #1a7f4b; --error: #2563b8; --floor: #9aa3b0; --panel: #f6f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa3b0; --paper: #15171b; --line: #33373f;
  --bad: #ff6b6b; --after: #e0a050; --good: #4cc38a; --error: #6ea8fe; --floor: #6b7482; --panel: #1d2026 } }
body { margin: 0 auto; max-width: 1480px; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.35rem; margin: 0 0 .5rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem }
.bad { color: var(--bad) } .after { color: var(--after) } .good { color: var(--good) } .soft { color: var(--soft) }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: .75rem }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .5rem }
figcaption { font-size: .85rem; padding: 0 .25rem } figure { overflow-x: auto }
svg { display: block; width: 100%; min-width: 420px; height: auto }
svg text { font: 10px system-ui, sans-serif; fill: var(--soft) } svg .name-bad { fill: var(--bad) }
svg .name-after { fill: var(--after) }
.grid { stroke: var(--line); stroke-width: 1 } .floor { fill: none; stroke: var(--floor); stroke-width: 1.5 }
.limit { fill: none; stroke: var(--floor); stroke-width: 1; stroke-dasharray: 4 3 }
.error { fill: none; stroke: var(--error); stroke-width: 1.5 } .dot { fill: var(--error) } .dot-bad { fill: var(--bad) }
.dot-after { fill: var(--after) }
.local { fill: none; stroke: var(--error); stroke-width: 1.3 } .local-bad { stroke: var(--bad) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .78rem; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
th:last-child, td:last-child { white-space: normal; min-width: 6.5rem; position: sticky; right: 0; background: var(--paper) }
@media (max-width: 600px) { body { padding: .75rem } th:last-child, td:last-child { min-width: 4rem }
  th, td { padding: .15rem .3rem } }
tr.failed td { color: var(--after) } tr.culprit td { color: var(--bad) } tr.missing td { color: var(--soft) }
"""
HEADINGS = {
    "max_abs": "max abs",
    "max_rel": "max rel",
    "rms": "rms",
    "nmse": "nmse",
    "cosine": "cosine",
    "max_ulp": "max ulp",
    "median_ulp": "median ulp",
}


def page(comparison: Comparison) -> str:
    """Return the whole page."""
    parts = [f'<h1 class="{"good" if comparison.equal else "bad"}">{_text(comparison.verdict)}</h1>']
    parts += [f"<p><b>Hint:</b> {_text(hint)}</p>" for hint in comparison.hints]
    if culprits := in_layers(comparison.wrong_by_themselves):
        parts.append(f"<p><b>Wrong by themselves</b>, given the candidate's own inputs: {_text(culprits)}</p>")
    parts += [f"<p>{_text(line)}</p>" for line in logits_lines(comparison)]
    warnings = [f'<p class="bad">Warning: {_text(warning)}</p>' for warning in comparison.warnings]
    parts += warnings[:WARNINGS]
    if more := warnings[WARNINGS:]:
        parts.append(f"<details><summary>{len(more)} more warnings</summary>{''.join(more)}</details>")
    parts.append(
        f'<p class="soft">reference {_text(comparison.reference)}<br>candidate {_text(comparison.candidate)} '
        f"({comparison.precision})<br>{_text(judged_by(comparison))}</p>"
    )
    parts.append("<h2>Error against noise</h2>")
    parts.append(
        '<p class="soft">Line and dots: the relative error of the whole computation so far. Rings: of the operation alone, '
        "given the candidate's own inputs. Grey: the noise floor, dashed the limit. Logarithmic. "
        '<span class="bad">Red</span> is wrong by itself, <span class="after">brown</span> follows from what is.</p>'
    )
    parts.append(
        '<div class="panels">' + "".join(_panel(t, rows, comparison) for t, rows in _by_layer(comparison.rows)) + "</div>"
    )
    parts += [f"<h2>{counts(comparison)}</h2>", _table(comparison)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(comparison.verdict)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _by_layer(rows: Iterable[Row]) -> list[tuple[str, list[tuple[Row, Judged]]]]:
    """Group the rows into a panel for each layer; rows before the first layer join it, rows after the last join that one."""
    panels: dict[str, list[tuple[Row, Judged]]] = {}
    title, pass_before = "", None
    for row in rows:
        if row.judged is None:
            continue
        here = place(row.name)
        if here.layer is not None or here.prefix != pass_before:
            step = "" if here.step is None else f"step {here.step}, "
            title, pass_before = f"{step}layer {here.layer or 0}", here.prefix
        panels.setdefault(title, []).append((row, row.judged))
    return list(panels.items())


def _panel(title: str, rows: list[tuple[Row, Judged]], comparison: Comparison) -> str:
    """Draw one layer: errors on a logarithmic vertical axis, activations in order from left to right."""
    values = [v for row, judged in rows for j in (judged, row.local) if j for v in (j.error, j.floor, j.limit * j.floor)]
    values = [v for v in values if v > 0 and math.isfinite(v)] or [1e-8, 1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)

    def x(i: int) -> float:
        return round(LEFT + WIDTH * (i + 0.5) / len(rows), 1)

    def y(value: float) -> float:
        place = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
        return round(TOP + HEIGHT * (1 - min(max(place, 0.0), 1.0)), 1)

    out = []
    for power in range(low, high + 1, max(1, (high - low) // 5)):
        at = y(10.0**power)
        out.append(f'<path class="grid" d="M{LEFT} {at}H{LEFT + WIDTH}"/>')
        out.append(f'<text x="{LEFT - 5}" y="{at + 3}" text-anchor="end">1e{power}</text>')
    if comparison.tolerance is None:
        out.append(_line("floor", [(x(i), y(judged.floor)) for i, (_, judged) in enumerate(rows)]))
        out.append(_line("limit", [(x(i), y(judged.limit * judged.floor)) for i, (_, judged) in enumerate(rows)]))
    out.append(_line("error", [(x(i), y(judged.error)) for i, (_, judged) in enumerate(rows)]))
    for i, (row, judged) in enumerate(rows):
        bad = "" if row.passed else "-bad" if comparison.is_culprit(row) else "-after"
        tip = f"{row.name}: error {judged.error:.2e}, floor {judged.floor:.1e}, {judged.ratio:.3g} times it"
        if row.local:
            tip += f"; alone {row.local.error:.2e}, {row.local.ratio:.3g} times its floor"
            ring = "local" if row.local.passed else "local local-bad"
            out.append(f'<circle class="{ring}" cx="{x(i)}" cy="{y(row.local.error)}" r="4.5"/>')
        out.append(f'<circle class="dot{bad}" cx="{x(i)}" cy="{y(judged.error)}" r="2.8"><title>{_text(tip)}</title></circle>')
        name = place(row.name).kind
        rotated = f'transform="translate({x(i) + 3},{TOP + HEIGHT + 10}) rotate(-60)"'
        out.append(f'<text class="name{bad}" text-anchor="end" {rotated}>{_text(name)}</text>')
    failed = sum(not row.passed for row, _ in rows)
    state = f'<span class="bad">{failed} different</span>' if failed else '<span class="good">within the limit</span>'
    size = f"0 0 {LEFT + WIDTH + 6} {TOP + HEIGHT + BOTTOM}"
    says = f"{title}: {failed} of {len(rows)} activations different" if failed else f"{title}: all within the limit"
    picture = f'<svg viewBox="{size}" role="img" aria-label="{_text(says)}">{"".join(out)}</svg>'
    return f"<figure><figcaption><b>{_text(title)}</b> {state}</figcaption>{picture}</figure>"


def _line(kind: str, points: list[tuple[float, float]]) -> str:
    return f'<path class="{kind}" d="M{"L".join(f"{x} {y}" for x, y in points)}"/>'


def _table(comparison: Comparison) -> str:
    head = "".join(
        f"<th>{h}</th>" for h in ["activation", *HEADINGS.values(), "error", "floor", "x floor", "local x", "token", ""]
    )
    lines = []
    for row in comparison.rows:
        numbers = [""] * (len(HEADINGS) + 5)
        if row.metrics and row.judged:
            numbers = [f"{getattr(row.metrics, key):.3g}" for key in HEADINGS]
            numbers[list(HEADINGS).index("cosine")] = f"{row.metrics.cosine:.7f}"
            judged = row.judged
            local = f"{row.local.ratio:.2g}" if row.local else ""
            numbers += [f"{judged.error:.2e}", f"{judged.floor:.0e}", f"{judged.ratio:.3g}", local, str(judged.token)]
        kind = "missing" if row in comparison.missing else "culprit" if comparison.is_culprit(row) else "failed"
        mark = f' class="{kind}"' * (not row.passed)
        name = f"<b>{_text(row.name)}</b>" if row is comparison.first else _text(row.name)
        last = _text(status(row, comparison))
        lines.append(f"<tr{mark}><td>{name}</td>{''.join(f'<td>{n}</td>' for n in numbers)}<td>{last}</td></tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'
