"""Find the angles by which a candidate's RoPE rotated, and the constants that produce them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from ... import ops
from ...config import Config, LinearRopeScaling, RopeScaling


def angles_between(before: np.ndarray, after: np.ndarray) -> np.ndarray | None:
    """Find the angle per position of each pair, from one token to the next; None for a single token.    [T, heads, K] -> [K/2]

    The sum over heads of after · conj(before) has the phase m·θ_j at position m, whatever the first position is.
    """
    if before.ndim != 3 or len(before) < 2:
        return None
    b, a = (np.asarray(x, np.float64)[..., 0::2] + 1j * np.asarray(x, np.float64)[..., 1::2] for x in (before, after))
    phase = np.sum(a * np.conj(b), axis=1)  # [T, K/2]
    step = np.sum(phase[1:] * np.conj(phase[:-1]), axis=0)
    frequencies = np.angle(step)
    # Refine: after rotating back, the remaining angle is small and grows with the position, so it can't wrap around.
    m = (np.arange(len(phase)) - (len(phase) - 1) / 2)[:, None]
    left = phase * np.exp(-1j * m * frequencies)
    left = np.angle(left * np.conj(np.sum(left, axis=0)))
    weight = np.abs(phase)
    return frequencies + np.sum(weight * m * left, axis=0) / np.sum(weight * m * m, axis=0)


def wrong_frequencies(
    found: np.ndarray, expected: np.ndarray, config: Config | None, positions: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield explanations of a candidate's angles per position, each with the angles that it predicts."""
    K = 2 * len(found)
    scaling = config.rope_scaling if config else None
    meant = config.rope_theta if config else fitted_theta(expected, None)
    scaled = config is None and not fits(ops.rope_frequencies(K, meant, None, np.float64), expected, positions)
    for assumed, note in ((scaling, ""), (None, ", without its scaling")) if scaling else ((None, ""),):
        theta = fitted_theta(found, assumed)
        angles = ops.rope_frequencies(K, theta, assumed, np.float64)
        if scaled:  # by unknown constants, so that there is no expected θ
            yield f"the reference's RoPE angles are scaled, yours are not: they are those of θ = {rounded(theta)} alone", angles
        elif abs(theta / meant - 1) > 1e-3:
            text = f"wrong RoPE θ: the angles are those of θ = {rounded(theta)}, and {rounded(meant)} was expected{note}"
            yield text, angles
    ratio = float(np.sum(expected * found) / np.sum(found * found))
    if abs(ratio - 1) > 1e-3:
        yield f"wrong RoPE scale factor: every angle is {rounded(1 / ratio)} times the expected one", expected / ratio
    unscaled = ops.rope_frequencies(K, meant, None, np.float64)
    if isinstance(scaling, RopeScaling) and (factor := scale_factor(found, unscaled, scaling)):
        text = f"wrong RoPE scale factor: {rounded(factor)}, and {rounded(scaling.factor)} was expected"
        yield text, ops.rope_frequencies(K, meant, dataclasses.replace(scaling, factor=factor), np.float64)
    j = int(np.argmax(np.abs(found / expected - 1)))
    yield f"wrong RoPE angles: pair {j} rotates by {found[j]:.6g} per position, and {expected[j]:.6g} was expected", found


def fits(made: np.ndarray, frequencies: np.ndarray, positions: np.ndarray) -> bool:
    """Return whether two sets of angles per position are the same up to rounding at the furthest position."""
    return bool(np.max(np.abs(made - frequencies)) * max(1, positions.max()) < 1e-3)


def scale_factor(found: np.ndarray, unscaled: np.ndarray, scaling: RopeScaling) -> float | None:
    """Find the factor by which Llama 3.1's scaling divided the slow pairs; None if no pair is slow enough."""
    slow = np.flatnonzero(2 * math.pi / unscaled > scaling.original_max_seq_len / scaling.low_freq_factor)
    if not slow.size or found[slow[0]] <= 0:
        return None
    return float(np.round(unscaled[slow[0]] / found[slow[0]], 2))  # the fastest of them rotates furthest, and is known best


def fitted_theta(frequencies: np.ndarray, scaling: RopeScaling | LinearRopeScaling | None) -> float:
    """Find the θ whose frequencies come closest: least squares in the angle per position, so that fast pairs count most."""

    def miss(log_theta: float) -> float:
        made = ops.rope_frequencies(2 * len(frequencies), math.exp(log_theta), scaling, np.float64)
        return float(np.sum((made - frequencies) ** 2))

    centre, reach = math.log(1e5), math.log(1e5)  # from 1 to 1e10
    for _ in range(12):  # a grid, then finer ones around the best: more than float64 resolves
        centre = min(np.linspace(centre - reach, centre + reach, 61), key=miss)
        reach /= 12
    return math.exp(centre)


def rounded(x: float) -> str:
    """Format four digits of a number, without an exponent: 500000; 1e-05 keeps it."""
    short = float(f"{x:.4g}")
    return f"{short:.0f}" if short == round(short) and abs(short) < 1e15 else f"{short:g}"
