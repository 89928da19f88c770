"""Exercise 1, softmax: scores to weights that sum to one."""

from __future__ import annotations

import numpy as np

from ... import ops
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return ordinary scores, masked ones, and rows far apart, each large enough for exp to overflow or to vanish."""
    masked = normal(2, 4, 4) + np.triu(np.full((4, 4), -np.inf, np.float32), k=1)
    apart = normal(3, 3, 5) + np.array([[0], [1000], [-1000]], np.float32)
    return [(normal(1, 2, 3, 5),), (masked,), (apart,)]


def small() -> list[tuple]:
    """Return two scores; two rows; large scores; rows far apart; a masked score."""
    apart = floats([0, 0], [1000, 1000])
    return [(floats(0, 1),), (floats([0, 0], [0, 1]),), (floats(1000, 1000),), (apart,), (floats(0, -np.inf),)]


EXERCISE = Exercise(
    name="softmax",
    arguments="x",
    statement="""\
Turn scores into weights, none negative, that sum to one along the last axis.

    y = exp(x) / sum(exp(x))        x [..., S] -> [..., S]

A score may be 1000, and may be -inf, which gives exactly 0.""",
    real="ops.softmax",
    reference=ops.softmax,
    cases=cases,
    mistakes=(
        "softmax_overflow",
        "softmax_maximum_of_all",
        "softmax_sum_of_all",
        "softmax_first_axis",
        "softmax_unnormalised",
    ),
    variants={
        "the maximum and the sum are those of the whole array: each row is a distribution of its own, axis=-1": lambda x: (
            (e := np.exp(x - np.max(x))) / np.sum(e)
        ),
        "the sum goes along the first axis, and the maximum along the last: both belong to the last, axis=-1": lambda x: (
            (e := np.exp(x - np.max(x, axis=-1, keepdims=True))) / np.sum(e, axis=0)
        ),
    },
    small=small,
)
