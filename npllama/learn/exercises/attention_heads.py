"""Exercise 7, attention_heads: average the values by the weights."""

from __future__ import annotations

import numpy as np

from ... import ops
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return weights and values of the same shapes as in attention_scores.py; the weights sum to one."""
    return [
        (ops.softmax(normal(1, 4, 3, 3)), normal(2, 2, 3, 8)),
        (ops.softmax(normal(3, 6, 1, 5)), normal(4, 2, 5, 4)),
        (ops.softmax(normal(5, 2, 3, 3)), normal(6, 2, 3, 4)),
    ]


def small() -> list[tuple]:
    """Return one head that averages two values; two heads; two heads and tokens; grouped heads."""
    return [
        (floats([[0.25, 0.75]]), floats([[0], [4]])),
        (floats([[1]], [[1]]), floats([[1]], [[2]])),
        (floats([[1], [1]], [[1], [1]]), floats([[1]], [[2]])),
        (floats([[1]], [[1]], [[1]], [[1]]), floats([[1]], [[2]])),
    ]


EXERCISE = Exercise(
    name="attention_heads",
    arguments="weights, values",
    statement="""\
Average the values that each query attends to, by its weights.

    heads = weights · v        weights [H, T, S], values [G, S, K] -> [T, H, K]

Heads share values as they share keys: the first H/G query heads use value head 0, and so on.""",
    real="ops.attention_heads",
    reference=ops.attention_heads,
    cases=cases,
    mistakes=(
        "values_tiled",
        "values_of_the_last_head",
        "values_of_head_0",
        "heads_before_tokens",
        "heads_reshaped",
    ),
    variants={
        "the weights are transposed: rows are queries, so the sum goes along the last axis": lambda weights, values: (
            ops.attention_heads(weights.swapaxes(-1, -2), values)
            if weights.shape[-2] == weights.shape[-1]
            else np.einsum("hts,hsk->shk", weights, np.repeat(values, len(weights) // len(values), axis=0))
        ),
    },
    small=small,
)
