"""Exercise 11, linear: one matrix product."""

from __future__ import annotations

import numpy as np

from ...engine.linear import linear
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return rows with a square matrix, whose transpose fits too; a vector and rows with matrices that are not square."""
    return [(normal(5, 2, 3, 4), normal(6, 4, 4)), (normal(1, 4), normal(2, 3, 4)), (normal(3, 5, 8), normal(4, 2, 8))]


def cosines(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Divide each dot product by the lengths of its two vectors."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(weight, axis=-1)
    return (x @ weight.T / lengths).astype(np.float32)


def small() -> list[tuple]:
    """Return a vector and a square matrix."""
    return [(floats(1, 2), floats([3, 1], [0, 2]))]


EXERCISE = Exercise(
    name="linear",
    arguments="x, weight",
    statement="""\
Multiply by a weight matrix: entry i of the result is the dot product of x with row i of the weight.

    y = x Wᵀ        x [..., in], weight [out, in] -> [..., out]

Each row of x gives a row of the result, whatever the other rows are.""",
    real="engine.linear.linear",
    reference=linear,
    cases=cases,
    variants={
        "the weight is read as [in, out], by reshape: transpose it, weight.T": lambda x, weight: (
            x @ weight.reshape(weight.shape[::-1])
        ),
        "the products are averaged: a dot product is their sum": lambda x, weight: x @ weight.T / np.float32(x.shape[-1]),
        "the dot products are divided by the lengths of the vectors: those are cosines": cosines,
    },
    small=small,
)
