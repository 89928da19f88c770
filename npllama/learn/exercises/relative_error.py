"""Exercise 16, relative_error: one number for how far an activation is from the right one."""

from __future__ import annotations

import numpy as np

from ...golden.compare.judging import relative_error
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return arrays a little apart, far apart, and scores with the mask's -inf in both."""
    x, far, mask = normal(1, 4, 8), normal(2, 4, 8), np.triu(np.full((4, 4), -np.inf, np.float32), k=1)
    return [
        (x + far * np.float32(0.01), x),
        (far * 3, x),
        (normal(3, 2, 4, 4) + mask, normal(4, 2, 4, 4) + mask),
    ]


def ratio(c: np.ndarray, r: np.ndarray) -> float:
    """Divide the sums of squares, without the root."""
    return relative_error(c, r) ** 2


def small() -> list[tuple]:
    """Return two numbers of which one is wrong, and a masked score."""
    return [(floats(3, 4.5), floats(3, 4)), (floats(0, -np.inf), floats(1, -np.inf))]


EXERCISE = Exercise(
    name="relative_error",
    arguments="candidate, reference",
    statement="""\
Measure how far a candidate is from the reference, relative to the reference's size.

    error = sqrt(Σ (candidate - reference)² / Σ reference²)        two arrays of the same shape -> a number

The sums are over the numbers that are finite in both: masked scores are -inf.""",
    real="golden.compare.judging.relative_error",
    reference=relative_error,
    cases=cases,
    variants={
        "-inf minus -inf is NaN: leave out what is not finite": lambda c, r: np.sqrt(np.sum((c - r) ** 2) / np.sum(r**2)),
        "the error is divided by the candidate's size: the reference is what is right": lambda c, r: relative_error(r, c),
        "this is the largest difference by the largest number: take the roots of the summed squares": lambda c, r: float(
            np.max(np.abs(c - r), where=np.isfinite(r), initial=0) / np.max(np.abs(r), where=np.isfinite(r), initial=0)
        ),
        "this is the mean of each number's relative error: divide the roots of the summed squares": lambda c, r: float(
            np.mean(np.abs(c - r)[np.isfinite(r)] / np.abs(r[np.isfinite(r)]))
        ),
        "the square root is missing": ratio,
        "the error is not relative: divide by the reference's size": lambda c, r: (
            relative_error(c, r) * float(np.linalg.norm(r[np.isfinite(r)].astype(np.float64)))
        ),
    },
    small=small,
    any_float=True,
)
