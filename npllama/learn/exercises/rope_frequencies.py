"""Exercise 3, rope_frequencies: the speed at which each pair rotates."""

from __future__ import annotations

import numpy as np

from ... import ops
from .exercise import Exercise


def cases() -> list[tuple]:
    """Return the constants of Llama 2 with small heads, and those of Llama 3.2 1B."""
    return [(8, 10000.0), (64, 500000.0)]


def from_one(head_dim: int, theta: float, *rest: object) -> np.ndarray:
    """Compute theta^(-2j/K) for j = 1, 2, ..., K/2."""
    return (theta ** (-np.arange(2, head_dim + 2, 2) / head_dim)).astype(np.float32)


def small() -> list[tuple]:
    """Return a head of one pair, and one of two."""
    return [(2, 100.0), (4, 100.0)]


EXERCISE = Exercise(
    name="rope_frequencies",
    arguments="head_dim, theta",
    statement="""\
Compute by how many radians each pair of a head's numbers is rotated per position.

    θ_j = theta^(-2j/K)        j = 0, 1, ..., K/2 - 1, K = head_dim -> float32 [K/2]

The first pair is rotated by 1 radian per position, each further one by less.""",
    real="ops.rope_frequencies",
    reference=ops.rope_frequencies,
    cases=cases,
    mistakes=(
        "exponent_j",
        "exponent_of_pairs",
        "theta_inverse",
        "frequency_per_number",
        "frequencies_twice",
        "theta_10000",
        "theta_500000",
    ),
    variants={"j counts from 1: it counts from 0, so that the first pair is rotated by 1 radian per position": from_one},
    small=small,
    rest=(None, np.float32),
)
