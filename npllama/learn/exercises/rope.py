"""Exercise 4, rope: adjacent pairs rotated by their position's angles."""

from __future__ import annotations

import numpy as np

from ... import ops
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return heads at positions 0, 1, 2, ... and at far ones; the rotations of a pair differ from pair to pair."""
    frequencies = ops.rope_frequencies(8, 10000.0, None, np.float32)
    positions = (np.arange(4), np.array([3, 70, 500]))
    return [(normal(1, len(m), 2, 8), *ops.rope_rotation(m, frequencies)) for m in positions]


def small() -> list[tuple]:
    """Return one pair rotated by 90 degrees, then two pairs by different angles."""
    return [
        (floats([[1, 0]]), floats([[0]]), floats([[1]])),
        (floats([[1, 2, 3, 4]]), floats([[0, 0.6]]), floats([[1, 0.8]])),
    ]


EXERCISE = Exercise(
    name="rope",
    arguments="x, cos, sin",
    statement="""\
Rotate each adjacent pair of a head's numbers by its position's angles.

    y[2j]   = x[2j] · cos[j] - x[2j+1] · sin[j]
    y[2j+1] = x[2j] · sin[j] + x[2j+1] · cos[j]        x [T, heads, K], cos, sin [T, 1, K/2] -> [T, heads, K]

The pairs are those of Meta's checkpoints: (x[0], x[1]), (x[2], x[3]), ...""",
    real="ops.rope",
    reference=ops.rope,
    cases=cases,
    mistakes=(
        "half_split",
        "interleaved_on_halves",
        "no_rope",
        "rope_backwards",
        "rope_apart",
        "rope_one_after_the_other",
        "cos_sin_exchanged",
        "half_of_the_head_rotated",
    ),
    small=small,
)
