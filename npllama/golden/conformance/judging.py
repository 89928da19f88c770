"""Compare an array of a port with the expected one: within the tolerance, or a line that says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..compare.judging import MASKED_BELOW


@dataclass(frozen=True)
class Tolerance:
    """Limit how far an array's numbers may be from the expected ones.

    max       of any number
    rms       the root of the mean square of all
    relative  each number's difference is divided by its expected magnitude
    """

    max: float
    rms: float
    relative: bool = False


@dataclass(frozen=True)
class Difference:
    """Distance of two arrays in both norms, and the place of the largest difference."""

    max: float
    rms: float
    at: tuple[int, ...]


def difference(found: np.ndarray, expected: np.ndarray, relative: bool) -> Difference:
    """Measure where the expected number is finite, and the found one too."""
    both = np.isfinite(expected) & np.isfinite(found)
    if not both.any():
        return Difference(0.0, 0.0, ())
    with np.errstate(all="ignore"):
        d = np.abs(np.where(both, found, 0.0).astype(np.float64) - np.where(both, expected, 0.0))
        if relative:
            d = np.where(d == 0, 0.0, d / np.abs(expected))
    at = np.unravel_index(int(np.argmax(d)), d.shape)
    return Difference(float(d.max()), float(np.sqrt(np.sum(d * d) / np.count_nonzero(both))), tuple(map(int, at)))


def problem(found: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> str | None:
    """Describe what is wrong in a line; None if nothing is. Where the expected number is NaN, any is right."""
    if found.shape != expected.shape:
        return f"its shape is {list(found.shape)}, expected {list(expected.shape)}"
    if found.dtype.kind not in "fiub":
        return f"it is {found.dtype}, expected numbers"
    found = _as_masked(found.astype(np.float64), expected)
    wrong = ~np.isnan(expected) & (np.isfinite(found) | np.isfinite(expected)) & (np.isfinite(found) != np.isfinite(expected))
    wrong |= np.isinf(expected) & (found != expected)
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        n = int(np.count_nonzero(wrong))
        return f"found {found[at]:g} at {_place(at)}, expected {expected[at]:g}" + f" ({n} such of {wrong.size})" * (n > 1)
    d = difference(found, expected, tolerance.relative)
    if d.max <= tolerance.max and d.rms <= tolerance.rms:
        return None
    error = "relative error" if tolerance.relative else "error"
    if d.max > tolerance.max:
        value = f"found {found[d.at]:.9g} at {_place(d.at)}, expected {expected[d.at]:.9g}"
        return f"{value}: {error if tolerance.relative else 'off by'} {d.max:.2g}, tolerance {tolerance.max:.2g}"
    return f"root-mean-square {error} {d.rms:.2g}, tolerance {tolerance.rms:.2g}"


def _place(at: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, at))}]"


def _as_masked(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Replace a finite number that masks as -inf does, such as the lowest float32, by -inf."""
    hidden = np.isneginf(expected)
    if not hidden.any():
        return found
    largest = np.max(np.where(hidden, -np.inf, expected), axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        return np.where(hidden & (found < np.maximum(largest, -MASKED_BELOW) - MASKED_BELOW), -np.inf, found)
