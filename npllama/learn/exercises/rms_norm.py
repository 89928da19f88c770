"""Exercise 2, rms_norm: each token scaled to unit root-mean-square."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ... import ops
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return rows of very different size, so small that eps counts, and far from zero in the mean."""
    sizes = np.array([[1], [0.01], [100]], np.float32)
    return [(normal(1, 3, 8) * sizes, normal(2, 8), 1e-5), (normal(3, 2, 3, 8) * 0.03 + 0.02, normal(4, 8), 1e-3)]


def small() -> list[tuple]:
    """Return one token; one with other weights; one where eps counts; two tokens."""
    ones = floats(1, 1)
    return [
        (floats(3, 4), ones, 1e-5),
        (floats(3, 4), floats(1, 2), 1e-5),
        (ones, ones, 3.0),
        (floats([3, 4], [0, 1]), ones, 1e-5),
    ]


def _centred(x: np.ndarray) -> np.ndarray:
    return x - np.mean(x, axis=-1, keepdims=True)


def _std(x: np.ndarray) -> np.ndarray:
    return np.std(x, axis=-1, keepdims=True)


# A standard deviation with eps in other places than norm_variance and layer_norm have it.
STD = "np.std is the centred standard deviation, it subtracts the mean: RMSNorm divides by sqrt(mean(x²) + eps)"
STD_NORM = "LayerNorm by a centred standard deviation: RMSNorm subtracts no mean, it divides by sqrt(mean(x²) + eps)"
VARIANTS: dict[str, Callable[..., np.ndarray]] = {
    f"{STD}; eps belongs inside the root": lambda x, weight, eps: x / (_std(x) + eps) * weight,
    f"{STD}; eps is missing": lambda x, weight, eps: x / _std(x) * weight,
    f"{STD_NORM}; eps belongs inside the root": lambda x, weight, eps: _centred(x) / (_std(x) + eps) * weight,
    f"{STD_NORM}; eps is missing": lambda x, weight, eps: _centred(x) / _std(x) * weight,
    "the row is divided by its length, the root of the sum of squares: RMS is the root of their mean, and eps is missing": (
        lambda x, weight, eps: x / np.linalg.norm(x, axis=-1, keepdims=True) * weight
    ),
    "the mean goes along the first axis, over the tokens: each token has its own, axis=-1 with keepdims=True": (
        lambda x, weight, eps: x / np.sqrt(np.mean(x * x, axis=0) + eps) * weight
    ),
    "x is multiplied by its root-mean-square: divide by it": lambda x, weight, eps: (
        x * np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    ),
    "eps is 1e-5 whatever the argument says": lambda x, weight, eps: ops.rms_norm(x, weight, 1e-5),
    "eps is 1e-6 whatever the argument says": lambda x, weight, eps: ops.rms_norm(x, weight, 1e-6),
}


EXERCISE = Exercise(
    name="rms_norm",
    arguments="x, weight, eps",
    statement="""\
Scale x to unit root-mean-square, then by a learned weight.

    y = x / sqrt(mean(x²) + eps) · weight        x [..., D], weight [D] -> [..., D]

Each token is a row of D numbers and has a mean square of its own.""",
    real="ops.rms_norm",
    reference=ops.rms_norm,
    cases=cases,
    mistakes=(
        "no_norm",
        "no_norm_weight",
        "norm_weight_plus_one",
        "norm_weight_first",
        "layer_norm",
        "eps_outside_root",
        "norm_variance",
        "norm_sum",
        "norm_over_tokens",
        "norm_without_root",
        "no_eps",
    ),
    variants=VARIANTS,
    small=small,
)
