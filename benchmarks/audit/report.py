"""docs/audit.md, from docs/audit.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .implementations import IMPLEMENTATIONS
from .published import MODELS

HEAD = """\
# Audit of released implementations

Each implementation was installed with pip, at the version given here, in an environment of its own, and ran the
[conformance suite](conformance.md) and a prompt of {n_tokens} tokens through models with the constants of published ones:

{models}

Those models have {layers} layers, {dim} dimensions, and random weights that are exact in bfloat16. They share
with the published model eps, θ, the scaling of RoPE, the head size, the ratio of query heads to key/value heads, and whether
the embeddings are tied. Each implementation reads a checkpoint file with its own loader, if it has one. This page was written
by `python -m benchmarks.audit --work audit` with npllama {npllama}; [audit.json](audit.json) has every figure.

Columns L0 to L6 are the suite's levels: cases passed, of those that the implementation's API can run; empty if it can
run none. In the columns of models, a trace is judged activation by activation against npllama's in float64; the
figure is the largest error in multiples of the noise floor, the error that rounding alone causes. Correct programs stay
below the limit: 32 in float32, 16 in bfloat16, 8 with quantised activations or with keys and values in float16.

"""


def page(content: Mapping[str, Any]) -> str:
    """Return docs/audit.md."""
    outcomes = content["outcomes"]
    models = "\n".join(f"- `{name}`: {purpose}" for name, purpose in content["models"].items())
    return (
        HEAD.format(**content["sizes"], models=models, npllama=content["npllama"])
        + "\n".join([*_table(outcomes, content["levels"], list(content["models"])), *_findings(outcomes), *_notes(outcomes)])
        + "\n"
    )


def _title(outcome: Mapping[str, Any]) -> str:
    return outcome["title"] + f", {outcome['variant']}" * bool(outcome["variant"])


def _version(outcome: Mapping[str, Any]) -> str:
    return next(iter(outcome["versions"].values()), "")


def _version_named(outcome: Mapping[str, Any]) -> str:
    return " ".join(next(iter(outcome["versions"].items()), (outcome["title"],)))


def _table(outcomes: Sequence[Mapping[str, Any]], levels: Sequence[str], models: Sequence[str]) -> Iterator[str]:
    head = ["implementation", "version", *levels, *(f"`{name}`" for name in models), "first divergence"]
    yield _row(head)
    yield _row(["---"] * len(head))
    for outcome in outcomes:
        if not outcome["versions"]:
            continue
        cells = [_title(outcome), _version(outcome)]
        for level in levels:
            found = outcome["levels"].get(level, {"passed": 0, "failed": 0})
            total = found["passed"] + found["failed"]
            cells.append(f"{found['passed']}/{total}" if total else "")
        cells += [_figure(outcome["traces"].get(name)) for name in models]
        cells.append(_first(outcome))
        yield _row(cells)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(trace: Mapping[str, Any] | None) -> str:
    if trace is None or trace["state"] == "not offered":
        return ""
    if trace["ratio"] is None:
        return "no result"
    figure = f"{trace['ratio']:.2g}" if trace["ratio"] < 1000 else f"{trace['ratio']:.0e}"
    return figure if trace["state"] == "equal" else f"**{figure}**"


def _first(outcome: Mapping[str, Any]) -> str:
    """Return the first divergence without the figures in brackets."""
    for finding in outcome["findings"]:
        if finding["found"].startswith("first divergence: "):
            return f"`{finding['found'].removeprefix('first divergence: ').partition(' (')[0]}`"
    return "none" if not outcome["findings"] else "below"


def _findings(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "\n## What differs\n"
    yield (
        "A cause in bold was confirmed: npllama with these constants computes every recorded activation as the implementation "
        "does, within rounding. `audit` is the audit's working folder.\n"
    )
    clean = True
    for outcome in outcomes:
        if not outcome["findings"]:
            continue
        clean = False
        yield f"### {_title(outcome)}\n"
        for finding in outcome["findings"]:
            yield f"- `{finding['where']}`: {_escaped(finding['found'])}"
            yield from (f"    - **{_escaped(text)}**" for text in finding["confirmed"])
            if not finding["confirmed"]:
                yield from (f"    - hint: {_escaped(text)}" for text in finding["causes"][:3])
        if lines := IMPLEMENTATIONS[outcome["name"]].source if outcome["name"] in IMPLEMENTATIONS else ():
            yield f"\nIn the source of {_version_named(outcome)}:\n"
            yield from (f"- {_escaped(line)}" for line in lines)
        commands = dict.fromkeys(finding["command"] for finding in outcome["findings"] if finding["command"])
        yield "\n```console"
        yield from (f"$ {command}" for command in commands)
        yield "```\n"
    if clean:
        yield "Nothing.\n"


def _notes(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Notes, and what was not run\n"
    seen: dict[str, list[str]] = {}
    for outcome in outcomes:
        lines = [outcome["note"]] if outcome["note"] else []
        lines += [outcome["stopped"]] if outcome["stopped"] else []
        lines += [f"not offered: {reason}" for reason in outcome["not_offered"] if reason != "not offered by its API"]
        lines += [f"`{name}`: {t['reason']}" for name, t in outcome["traces"].items() if t["state"] == "not offered"]
        for line in dict.fromkeys(lines):
            seen.setdefault(outcome["title"], [])
            if line not in seen[outcome["title"]]:
                seen[outcome["title"]].append(line)
    run = {(outcome["name"], outcome["variant"]) for outcome in outcomes}
    for one in IMPLEMENTATIONS.values():
        if one.why_not:
            seen[one.title] = [one.why_not]
        elif missing := [variant.name for variant in one.variants if (one.name, variant.name) not in run]:
            which = f" ({', '.join(missing)})" if any(missing) else ""
            text = f"not run for this page{which}; `python -m benchmarks.audit --only {one.name}` runs it"
            seen.setdefault(one.title, []).append(text)
    for title, lines in seen.items():
        yield f"- {title}: " + "; ".join(_escaped(line.rstrip(".")) for line in lines) + "."
    yield "\n## Versions\n"
    shown: set[str] = set()
    for outcome in outcomes:
        if outcome["versions"] and outcome["title"] not in shown:
            shown.add(outcome["title"])
            yield f"- {outcome['title']}: " + ", ".join(f"{name} {v}" for name, v in outcome["versions"].items())


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def described(models: Iterable[str]) -> dict[str, str]:
    """Return the published models by name, with what each is there to show."""
    return {name: MODELS[name].purpose for name in models}
