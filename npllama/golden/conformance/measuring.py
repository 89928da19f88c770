"""Measure the facts that the suite records of each case: its tolerances, and the mistakes that it catches.

Each case is computed exactly, in float64, and for each profile in several correct ways: with sums in two orders, in sequence
and as BLAS computes them, and with the roundings of both conventions. The noise floor is the largest difference from the exact
numbers, or one rounding of the largest number if that is more. The condition of the operation is how far the exact numbers
move when each input moves by one rounding in float32, the precision in which all profiles but float64 sum. The tolerance is
the condition plus the floor times the limit of `npllama compare` for one operation in that precision, or for several;
golden/compare/noise.py derives these limits.

tests/record_conformance.py stores the measurements in recorded.json, so that a case is the same bytes everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import model
from ...engine.weights import Weight, widen
from ...scope import Ops
from ..compare.metrics import unit_roundoff
from ..compare.noise import LIMITS
from ..mistakes import MISTAKES, Mistake
from ..precision import Precision, profile, sequential_norms
from .cases import PROFILES, Case
from .judging import Tolerance, difference, problem
from .numbers import words
from .operations import DoesNotApply, Outputs, Program

MARGIN = 2  # times the tolerance: a mistake counts as caught only beyond this, so that it is caught on any machine
DRAWS = 4  # number of random directions in which the inputs move
EXACT = Program(Precision("float64"))


def in_sequence(made: Ops) -> Ops:
    """Sum sequentially in every operation, as a plain loop does."""

    def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
        return np.cumsum(x[..., None, :] * widen(weight), axis=-1, dtype=x.dtype)[..., -1]

    def attention_scores(q: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
        keys = np.repeat(keys, q.shape[-2] // keys.shape[-3], axis=-3)  # [..., H, S, K]
        products = np.cumsum(q.swapaxes(-2, -3)[..., None, :] * keys[..., None, :, :], axis=-1)[..., -1]
        return products / np.asarray(q.shape[-1], q.dtype) ** np.asarray(0.5, q.dtype) + mask

    def attention_heads(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        values = np.repeat(values, weights.shape[-3] // values.shape[-3], axis=-3)  # [..., H, S, K]
        return np.cumsum(weights[..., None] * values[..., None, :, :], axis=-2)[..., -1, :].swapaxes(-2, -3)

    return replace(
        sequential_norms(made),
        linear=linear,
        linears=lambda x, *weights: [linear(x, weight) for weight in weights],
        attention_scores=attention_scores,
        attention_heads=attention_heads,
    )


class InSequence(Precision):
    """Float32, with parts or without, whose sums are those of a plain loop."""

    def without_parts(self) -> Ops:
        """Return the plain operations, with other sums."""
        return in_sequence(model.PLAIN)


def programs(name: str) -> Iterator[Program]:
    """Yield the correct programs of a rounding profile."""
    for precision in map(profile, PROFILES[name]):
        yield Program(precision)
        if precision.name == "float32":
            yield Program(InSequence("float32", parts=precision.parts))


def moved(case: Case, unit: float, text: str) -> Case:
    """Return the case with each input moved by one rounding, up or down."""

    def change(name: str, x: Any) -> Any:
        if isinstance(x, dict):
            return {key: change(f"{name}/{key}", value) for key, value in x.items()}
        if not isinstance(x, np.ndarray) or x.dtype != np.float32:
            return x
        up = (words(f"{text}/{name}", x.size) >> np.uint64(63)).astype(np.int64).reshape(x.shape)
        with np.errstate(invalid="ignore"):  # an infinite number stays infinite
            return x.astype(np.float64) * (1 + unit * (2 * up - 1))

    return replace(case, arguments={name: change(name, x) for name, x in case.arguments.items()})


@dataclass(frozen=True)
class Measured:
    """Hold a case's recorded facts: output -> profile -> tolerance, and the names of the mistakes it catches in float32."""

    tolerances: dict[str, dict[str, Tolerance]]
    catches: tuple[str, ...]


@functools.lru_cache(maxsize=4)
def exact(case: Case) -> Outputs:
    """Return the expected outputs.    float64"""
    return {name: x.astype(np.float64) for name, x in case.run(EXACT).items()}


@functools.lru_cache(maxsize=4)
def moves_of(case: Case) -> list[Outputs]:
    """Return the exact outputs when the inputs move by a rounding in float32."""
    draws = [] if case.operation.exact else [f"{case.path}/{draw}" for draw in range(DRAWS)]
    return [moved(case, unit_roundoff("float32"), draw).run(EXACT) for draw in draws]


@functools.lru_cache(maxsize=16)
def tolerances(case: Case, name: str) -> dict[str, Tolerance] | None:
    """Measure a rounding profile's tolerances; None if the case's numbers are not finite in it."""
    expected, relative = exact(case), case.operation.relative
    limits = LIMITS[PROFILES[name][0]] if name in LIMITS else LIMITS["float16"]
    limit = limits.one if case.level == "L1" else limits.several
    computed, scale = name, 1.0
    if name == "float64":  # the exact reference is float64 itself, so both round alike
        computed, scale = "float32", unit_roundoff("float64") / unit_roundoff("float32")
    results = [case.run(program) for program in programs(computed)]
    moves = moves_of(case)
    least = {} if name in ("float64", "float32") else tolerances(case, "float32") or {}
    unit = (
        0.0 if case.operation.exact else unit_roundoff(computed if case.operation.rounded and computed in LIMITS else "float32")
    )
    found = {}
    for output, y in expected.items():
        if any(not np.array_equal(np.isfinite(result[output]), np.isfinite(y)) for result in results):
            return None
        apart = [difference(result[output].astype(np.float64), y, relative) for result in results]
        condition = [difference(result[output], y, relative) for result in moves]
        finite = y[np.isfinite(y)]
        sizes = (1.0, 1.0) if relative else (float(np.max(np.abs(finite), initial=0)), float(np.sqrt(np.mean(finite**2))))
        rounded = []
        for norm, size in zip(("max", "rms"), sizes, strict=True):
            floor = max(unit * size, *(getattr(d, norm) for d in apart))
            rounded.append(_two_digits(scale * (limit * floor + max((getattr(d, norm) for d in condition), default=0.0))))
        low = least.get(output, Tolerance(0, 0))
        found[output] = Tolerance(max(rounded[0], low.max), max(rounded[1], low.rms), relative)
    return found


def _two_digits(x: float) -> float:
    """Round up to two digits, so that other machines measure the same number in nearly every case."""
    return float(f"{1.05 * x:.1e}")


def wrong(case: Case, mistake: Mistake, precision: Precision) -> Outputs | None:
    """Return what a program with a mistake computes; None if it stops with an error.

    Raises DoesNotApply if the mistake can't change the case.
    """
    try:
        return case.run(Program(precision, mistake))
    except DoesNotApply:
        raise
    except (ValueError, IndexError):
        return None


def caught(case: Case, mistake: Mistake, limits: dict[str, Tolerance], precision: Precision, expected: Outputs) -> bool:
    """Return whether the case fails for a program that makes this mistake."""
    try:
        found = wrong(case, mistake, precision)
    except DoesNotApply:
        return False
    return found is None or any(problem(found[name], y, limits[name]) for name, y in expected.items())


def measure(case: Case) -> Measured:
    """Measure what is recorded."""
    found = {name: tolerances(case, name) for name in PROFILES if not case.profiles or name in case.profiles}
    expected, precision = exact(case), Precision("float32")
    limits = found["float32"]
    if limits is None:
        raise ValueError(f"{case.path}: its numbers are not finite in float32")
    wider = {name: replace(limit, max=MARGIN * limit.max, rms=MARGIN * limit.rms) for name, limit in limits.items()}
    catches = tuple(name for name, m in MISTAKES.items() if caught(case, m, wider, precision, expected))
    by_output = {output: {name: found_in[output] for name, found_in in found.items() if found_in} for output in expected}
    return Measured(by_output, catches)
