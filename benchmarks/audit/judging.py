"""Judge an adapter's results: the suite's cases by its tolerances, the published models' traces by compare."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from npllama import forward, load
from npllama.errors import NpllamaError
from npllama.golden.compare import Comparison, compare
from npllama.golden.compare.inputs import read_activations
from npllama.golden.compare.judging import relative_error
from npllama.golden.compare.maps import read_map
from npllama.golden.conformance.grading import grade
from npllama.golden.conformance.suite import Expected, built_in, read_array

from . import published
from .implementations import Implementation, Variant

FAR = 0.05  # of logits: more than any rounding, less than a wrong constant changes them
GRADED = ("resolve_config", "forward_file", "forward_passes", "forward_at", "encode")


@dataclass
class Level:
    """The results of a level: how many cases passed, failed, and are not offered."""

    passed: int = 0
    failed: int = 0
    not_offered: int = 0

    @property
    def text(self) -> str:
        """Return 5/5, or 3/5 if two failed; an empty text if nothing was run."""
        return f"{self.passed}/{self.passed + self.failed}" if self.passed + self.failed else ""


@dataclass
class Finding:
    """One difference of an implementation: the case or model in which it shows, and the command that shows it."""

    where: str
    found: str
    causes: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)  # the wrong constants with which npllama computes the same
    command: str = ""


@dataclass
class Trace:
    """The verdict on one published model."""

    state: str  # equal, different, failed, not offered
    ratio: float | None = None  # the largest error of an activation in noise floors
    reason: str = ""


@dataclass
class Outcome:
    """Everything on one variant of an implementation."""

    name: str
    title: str
    variant: str
    profile: str
    form: str
    packages: list[str]
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    stopped: str = ""  # why it could not be installed, or ended early
    levels: dict[str, Level] = field(default_factory=dict)
    not_offered: list[str] = field(default_factory=list)
    traces: dict[str, Trace] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def read_outcomes(file: Path) -> list[dict[str, Any]]:
    """Return the lines that an adapter has written."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def grade_suite(outcome: Outcome, lines: Iterable[Mapping[str, Any]], folder: Path, suite: Path, levels: Sequence[str]) -> None:
    """Grade the cases that the adapter was asked for, and fill in levels and findings."""
    states = {line["case"]: line for line in lines if "case" in line}

    def result_of(case: Expected) -> Any:
        line = states[case.path]
        if line["state"] != "done":
            return line["reason"] if line["state"] == "failed" else None
        found = {name: read_array(folder / "results" / case.path, name, y.shape) for name, y in case.outputs.items()}
        return found if all(x is not None for x in found.values()) else None

    cases = [case for case in built_in(levels) if case.path in states and case.is_for(outcome.profile)]
    if not cases:
        return
    for result in grade(outcome.title, cases, result_of, outcome.profile).results:
        level = outcome.levels.setdefault(result.case.level, Level())
        level.passed += result.passed
        level.failed += result.failed
        if not (result.passed or result.failed):
            level.not_offered += 1
        if result.failed:
            command = f"npllama conformance check {_shell(folder)}/results --vectors {_shell(suite)}"
            command += f" --profile {outcome.profile} --level {result.case.level}"
            if states[result.case.path]["state"] == "failed":  # there is no result that could be checked
                command = _again(outcome)
            outcome.findings.append(Finding(result.case.path, result.problem or "", list(result.hints), command=command))
    reasons = [line["reason"] for line in states.values() if line["state"] == "not offered"]
    outcome.not_offered = sorted(set(reasons))


def judge_traces(
    outcome: Outcome,
    lines: Iterable[Mapping[str, Any]],
    folder: Path,
    models: Path,
    implementation: Implementation,
    variant: Variant,
) -> None:
    """Compare each published model's trace with npllama's; where it differs, find the wrong constants that give the same."""
    for line in lines:
        if "published" not in line:
            continue
        name, state = line["published"], line["state"]
        if state != "done":
            outcome.traces[name] = Trace(state, reason=line["reason"])
            if state == "failed":
                outcome.findings.append(Finding(name, line["reason"], command=_again(outcome)))
            continue
        candidate = next(path for path in (folder / "published" / f"{name}.npz", folder / "published" / name) if path.exists())
        kind = "" if variant.model == "F32" else f"-{variant.model}"
        model, reference = (models / name / f"{what}{kind}" for what in ("model", "reference"))
        try:
            comparison = _compare(reference, candidate, model, implementation, variant)
        except NpllamaError as error:
            outcome.traces[name] = Trace("failed", reason=str(error))
            outcome.findings.append(Finding(name, str(error)))
            continue
        equal = comparison.equal
        outcome.traces[name] = Trace("equal" if equal else "different", _ratio(comparison))
        if not equal:
            command = f"npllama compare {_shell(reference)} {_shell(candidate)} -m {_shell(model)} --partial"
            command += f" --map {implementation.map}" * bool(implementation.map)
            command += f" --precision {variant.precision}" * bool(variant.precision)
            finding = Finding(name, comparison.verdict, comparison.hints, command=command)
            if not kind:
                finding.confirmed = _same_as(name, candidate, models, implementation, variant)
            outcome.findings.append(finding)


def _compare(reference: Path, candidate: Path, model: Path, implementation: Implementation, variant: Variant) -> Comparison:
    return compare(reference, candidate, names=implementation.map, model=model, precision=variant.precision, partial=True)


def _ratio(comparison: Comparison) -> float | None:
    ratios = [row.judged.ratio for row in comparison.rows if row.judged]
    return max(ratios, default=None)


def _same_as(name: str, candidate: Path, models: Path, implementation: Implementation, variant: Variant) -> list[str]:
    """Return the wrong constants with which npllama computes what the candidate did, every activation within rounding."""
    given, found = published.MODELS[name], []
    logits = _logits(candidate, implementation.map)
    right = load(models / name / "model")
    for i, (text, changes) in enumerate(published.mistakes(given.config).items()):
        predicted = forward(right.params, replace(right.config, **changes), np.array(published.TOKENS))
        if logits is None or relative_error(logits, predicted) > FAR:
            continue  # a cheap test first: tracing takes longer
        model, reference = published.changed(given, changes, models / name / f"wrong-{i}")
        if _compare(reference, candidate, model, implementation, variant).equal:
            found.append(text)
    return found


def _logits(candidate: Path, names: str | None) -> np.ndarray | None:
    """Return the logits among a candidate's arrays, under whichever name its map gives them."""
    found, map_ = read_activations(candidate), read_map(names)
    for name in found:
        known = map_.find(name)
        if isinstance(known, tuple) and known[0] == "logits":
            return np.asarray(found[name]).reshape(len(published.TOKENS), -1)
    return None


def _again(outcome: Outcome) -> str:
    return f"python -m benchmarks.audit --work audit --only {outcome.name}"


def _shell(path: Path) -> str:
    return shlex.quote(str(path))
