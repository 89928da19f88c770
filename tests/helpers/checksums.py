"""Summarise an array in two numbers, to record results that must be equal on every machine within rounding."""

from __future__ import annotations

import numpy as np


def weighted_sum(y: np.ndarray) -> list[float]:
    """Return a sum in which every number has a different weight, and the sum of magnitudes, over finite numbers."""
    y = y[np.isfinite(y)]
    weights = 1 + np.arange(y.size) % 97 / 64
    return [float(np.sum(y * weights)), float(np.sum(np.abs(y)))]
