"""A whole array in two numbers, to record what must be equal on every machine but for rounding."""

from __future__ import annotations

import numpy as np


def weighted_sum(y: np.ndarray) -> list[float]:
    """A sum in which no two numbers have the same weight, and the sum of magnitudes, over what is finite."""
    y = y[np.isfinite(y)]
    weights = 1 + np.arange(y.size) % 97 / 64
    return [float(np.sum(y * weights)), float(np.sum(np.abs(y)))]
