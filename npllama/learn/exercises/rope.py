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


def mixed(x: np.ndarray, partner: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate with a cosine and a sine for each number, x · cos + partner · sin."""
    return x * cos + partner * sin


def halves_with_repeated_angles(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Pair x[j] with x[j + K/2], and repeat each angle for two neighbours."""
    half = x.shape[-1] // 2
    partner = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return mixed(x, partner, np.repeat(cos, 2, axis=-1), np.repeat(sin, 2, axis=-1))


def pairs_with_doubled_angles(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Pair neighbours, and use the list of angles for the first half and again for the second."""
    partner = np.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
    return mixed(x, partner, np.concatenate([cos, cos], axis=-1), np.concatenate([sin, sin], axis=-1))


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
    variants={
        "two layouts are mixed: the pairs are x[j] with x[j + K/2], and the angles those of adjacent pairs": (
            halves_with_repeated_angles
        ),
        "two layouts are mixed: the pairs are adjacent, and the angles those of x[j] with x[j + K/2]; use np.repeat": (
            pairs_with_doubled_angles
        ),
        "the second of the pair has cos and sin exchanged: y[2j+1] = x[2j] · sin + x[2j+1] · cos": lambda x, cos, sin: np.stack(
            [x[..., 0::2] * cos - x[..., 1::2] * sin, x[..., 0::2] * cos + x[..., 1::2] * sin], axis=-1
        ).reshape(x.shape),
    },
    small=small,
)
