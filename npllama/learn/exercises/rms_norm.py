"""Exercise 2, rms_norm: each token scaled to unit root-mean-square."""

from __future__ import annotations

import numpy as np

from ... import ops
from .exercise import Exercise, normal


def cases() -> list[tuple]:
    """Return rows of very different size, so small that eps counts, and far from zero in the mean."""
    sizes = np.array([[1], [0.01], [100]], np.float32)
    return [(normal(1, 3, 8) * sizes, normal(2, 8), 1e-5), (normal(3, 2, 3, 8) * 0.03 + 0.02, normal(4, 8), 1e-3)]


EXERCISE = Exercise(
    name="rms_norm",
    arguments="x, weight, eps",
    statement="""\
Scale x to unit root-mean-square, then by a learned weight.

    y = x / sqrt(mean(x²) + eps) · weight        x [..., D], weight [D] -> [..., D]

Each token, a row of D numbers, is scaled by itself.""",
    real="ops.rms_norm",
    reference=ops.rms_norm,
    cases=cases,
    mistakes=(
        "no_norm",
        "no_norm_weight",
        "norm_weight_plus_one",
        "layer_norm",
        "eps_outside_root",
        "norm_variance",
        "norm_sum",
        "norm_over_tokens",
        "norm_without_root",
        "no_eps",
    ),
)
