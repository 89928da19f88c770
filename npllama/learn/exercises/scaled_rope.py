"""Exercise 13, scaled_rope: Llama 3.1's frequencies for longer texts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ... import ops
from ...config import RopeScaling
from .exercise import Exercise

Arguments = tuple[int, float, float, float, float, int]


def cases() -> list[Arguments]:
    """Return the constants of Llama 3.1 8B and Llama 3.2 1B, and those of a small model with a short context."""
    return [
        (128, 500000.0, 8.0, 1.0, 4.0, 8192),
        (64, 500000.0, 32.0, 1.0, 4.0, 8192),
        (16, 10000.0, 2.0, 1.0, 8.0, 512),
    ]


def reference(head_dim: int, theta: float, factor: float, low: float, high: float, length: int) -> np.ndarray:
    """Call ops.rope_frequencies() with the scaling."""
    return ops.rope_frequencies(head_dim, theta, RopeScaling(factor, low, high, length), np.float32)


def plain(head_dim: int, theta: float, *scaling: float) -> np.ndarray:
    """Leave out the scaling."""
    return ops.rope_frequencies(head_dim, theta, None, np.float32)


def in_a_step(head_dim: int, theta: float, factor: float, low: float, high: float, length: int) -> np.ndarray:
    """Divide all frequencies whose waves are longer than length / high, without interpolation."""
    frequencies = plain(head_dim, theta)
    return np.where(2 * math.pi / frequencies > length / high, frequencies / np.float32(factor), frequencies)


def the_short_waves(head_dim: int, theta: float, factor: float, low: float, high: float, length: int) -> np.ndarray:
    """Divide the frequencies of short waves and keep those of long ones."""
    frequencies = plain(head_dim, theta)
    s = (length / (2 * math.pi / frequencies) - low) / np.float32(high - low)
    s = 1 - np.clip(s, 0, 1)
    return ((1 - s) * frequencies / np.float32(factor) + s * frequencies).astype(np.float32)


def by_ratio(
    ratio: Callable[[np.ndarray, int], np.ndarray], lowest: float = 0, highest: float = 1
) -> Callable[..., np.ndarray]:
    """Return a scaled_rope() with another ratio of length to wavelength, and s between other limits."""

    def scaled_rope(head_dim: int, theta: float, factor: float, low: float, high: float, length: int) -> np.ndarray:
        frequencies = plain(head_dim, theta)
        s = np.clip((ratio(2 * math.pi / frequencies, length) - low) / np.float32(high - low), lowest, highest)
        return ((1 - s) * frequencies / np.float32(factor) + s * frequencies).astype(np.float32)

    return scaled_rope


def small() -> list[Arguments]:
    """Return four pairs: two short waves, one between, a long one."""
    return [(8, 10000.0, 2.0, 1.0, 4.0, 1024)]


EXERCISE = Exercise(
    name="scaled_rope",
    arguments="head_dim, theta, factor, low, high, length",
    statement="""\
Compute RoPE's frequencies and lower those of long waves, as Llama 3.1 does for texts longer than its first training's.

    θ_j = theta^(-2j/K)        λ = 2π/θ_j        s = (length/λ - low) / (high - low)

    θ_j where s > 1,  θ_j/factor where s < 0,  else (1 - s)·θ_j/factor + s·θ_j        -> float32 [K/2]

K is head_dim, and length the context length of the first training.""",
    real="ops.rope_frequencies",
    reference=reference,
    cases=cases,
    variants={
        "the frequencies are not scaled": plain,
        "all frequencies are divided: those of short waves (s > 1) stay": lambda head_dim, theta, factor, *others: (
            plain(head_dim, theta) / np.float32(factor)
        ),
        "s is not kept between 0 and 1: np.clip(s, 0, 1)": by_ratio(
            lambda wavelengths, length: length / wavelengths, -np.inf, np.inf
        ),
        "the wavelength lacks 2π: λ = 2π/θ_j": by_ratio(lambda wavelengths, length: length / wavelengths * (2 * math.pi)),
        "the wavelength is divided by the length: s has length/λ": by_ratio(lambda wavelengths, length: wavelengths / length),
        "there is no interpolation: between s = 0 and s = 1 both are mixed": in_a_step,
        "the frequencies of short waves are divided, and those of long ones stay: it is the other way round": the_short_waves,
        "the frequencies are multiplied by the factor: divide by it, so that the waves become longer": (
            lambda head_dim, theta, factor, *others: reference(head_dim, theta, 1 / factor, *others)
        ),
    },
    small=small,
)
