"""What a tap returns, looked at: model.py calls x = tap(name, x) on every activation and goes on with the result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def checked(tap: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[str, np.ndarray], np.ndarray]:
    """The same tap, but a ValueError where it returns no array of the activation's shape: as one that forgot `return x`."""

    def check(name: str, x: np.ndarray) -> np.ndarray:
        y = tap(name, x)
        if not isinstance(y, np.ndarray) or y.shape != x.shape:
            found = f"an array of shape {y.shape}" if isinstance(y, np.ndarray) else repr(y)[:60]
            raise ValueError(f"the tap returned {found} for {name}, expected an array of shape {x.shape}")
        return y

    return check
