"""Exercise 15, round_bfloat16: the nearest number of 16 bits."""

from __future__ import annotations

import numpy as np

from ...golden.precision import round_bfloat16, round_float16
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return ordinary numbers, ties between two bfloat16 on either side of zero, and powers of two with their neighbours."""
    steps = np.arange(1, 9, dtype=np.float32) / 256  # halves of bfloat16's steps between 1 and 2
    powers = np.float32(2.0) ** np.arange(-20, 20, 5, dtype=np.float32)
    return [(normal(1, 3, 8),), (np.concatenate([1 + steps, -1 - steps]),), (np.stack([powers, np.nextafter(powers, 0)]),)]


def small() -> list[tuple]:
    """Return two ties: bfloat16 has only even numbers between 256 and 512."""
    return [(floats(257, 259),)]


EXERCISE = Exercise(
    name="round_bfloat16",
    arguments="x",
    statement="""\
Round each float32 to the nearest bfloat16, and return it as float32.

    a bfloat16 is a float32 whose last 16 bits are zero; of two that are as near, the one whose last bit (bit 16) is even

    x float32, any shape -> float32, like x

x.view(np.uint32) is the same memory as whole numbers. No number is NaN, infinite or too large.""",
    real="golden.precision.round_bfloat16",
    reference=round_bfloat16,
    cases=cases,
    mistakes=("rounding_bfloat16_cut", "rounding_bfloat16_ties_up"),
    variants={
        "this is float16: it has 10 bits of fraction and 5 of exponent, bfloat16 has 7 and 8": round_float16,
        "x is not rounded": lambda x: x,
    },
    small=small,
)
