"""Exercise 8, swiglu: one projection gates the other."""

from __future__ import annotations

import numpy as np

from ... import ops
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return ordinary numbers, and gates so large that exp overflows."""
    return [(normal(1, 3, 8), normal(2, 3, 8)), (normal(3, 4) + np.array([1000, -1000, 1, 0], np.float32), normal(4, 4))]


def small() -> list[tuple]:
    """Return one channel, an ordinary gate first, then large ones."""
    return [(floats(gate), floats(2)) for gate in (1, 1000, -1000)]


EXERCISE = Exercise(
    name="swiglu",
    arguments="gate, up",
    statement="""\
Let one projection of the input gate the other.

    y = silu(gate) · up        silu(x) = x · σ(x) = x / (1 + exp(-x))        gate, up [..., F] -> [..., F]

A gate may be 1000 or -1000.""",
    real="ops.swiglu",
    reference=ops.swiglu,
    cases=cases,
    mistakes=(
        "gate_up_exchanged",
        "no_silu",
        "no_up",
        "gate_for_up",
        "relu",
        "sigmoid",
        "gelu_tanh",
        "gelu_erf",
        "quick_gelu",
        "silu_overflow",
        "silu_wrong_sign",
    ),
    variants={
        "silu is applied to the product: it belongs to the gate alone, silu(gate) · up": lambda gate, up: ops.silu(gate * up),
        "up is added: multiply, silu(gate) · up": lambda gate, up: ops.silu(gate) + up,
    },
    small=small,
)
