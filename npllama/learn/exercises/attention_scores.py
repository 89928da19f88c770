"""Exercise 6, attention_scores: how well each query matches each key, with grouped heads."""

from __future__ import annotations

import math

import numpy as np

from ... import ops
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return queries and keys of several shapes, and masks of several kinds.

    Four query heads on two key heads; decode, with one query and a mask of zeros; as many key heads as query heads; masks that
    are not triangular: after a slot of padding, and of finite numbers.
    """
    triangle = ops.causal_mask(np.arange(3), np.arange(3), np.float32)
    padded = ops.causal_mask(np.array([1, 2]), np.array([9, 0, 1, 2]), np.float32)
    finite = np.array([[[0, -np.inf, -np.inf], [-1.5, 0, -np.inf]]], np.float32)
    return [
        (normal(1, 3, 4, 8), normal(2, 2, 3, 8), triangle),
        (normal(3, 1, 6, 4), normal(4, 2, 5, 4), np.zeros((1, 1, 5), np.float32)),
        (normal(5, 3, 2, 4), normal(6, 2, 3, 4), triangle),
        (normal(7, 2, 2, 4), normal(8, 1, 4, 4), padded),
        (normal(9, 2, 2, 4), normal(10, 2, 3, 4), finite),
    ]


def small() -> list[tuple]:
    """Return one query and key; a mask; two heads; two queries; grouped heads; two queries of two heads."""
    zero = floats([[0]])
    return [
        (floats([[2, 0, 0, 0]]), floats([[3, 0, 0, 0]]), zero),
        (floats([[2, 0, 0, 0]]), floats([[1, 0, 0, 0], [3, 0, 0, 0]]), floats([[0, -1]])),
        (floats([[1], [2]]), floats([[3]], [[5]]), zero),
        (floats([[1]], [[2]]), floats([[1], [3]]), floats([[0, -np.inf], [0, 0]])),
        (floats([[1], [1], [1], [1]]), floats([[1]], [[2]]), zero),
        (floats([[1], [2]], [[3], [4]]), floats([[1]], [[1]]), floats([[0], [0]])),
    ]


EXERCISE = Exercise(
    name="attention_scores",
    arguments="q, keys, mask",
    statement="""\
Score how well each query matches each key, scaled and masked.

    scores = q·k / sqrt(K) + mask        q [T, H, K], keys [G, S, K], mask [1, T, S] -> [H, T, S]

H is a multiple of G: the first H/G query heads share key head 0, the next H/G key head 1, and so on.""",
    real="ops.attention_scores",
    reference=ops.attention_scores,
    cases=cases,
    mistakes=(
        "no_mask",
        "unscaled",
        "scaled_by_all_heads",
        "scaled_by_k",
        "mask_scaled",
        "mask_of_its_own",
        "scores_transposed",
        "keys_tiled",
        "keys_of_the_last_head",
        "keys_of_head_0",
    ),
    variants={
        "the products are multiplied by sqrt(K): divide by it": lambda q, keys, mask: (
            ops.query_key_products(q, keys) * math.sqrt(q.shape[-1]) + mask
        ),
        "the mask is subtracted: add it": lambda q, keys, mask: ops.attention_scores(q, keys, np.negative(mask)),
        "reshape keeps the order of the numbers, and so mixes tokens and entries of the keys: swap the axes instead": (
            lambda q, keys, mask: ops.attention_scores(q, keys.reshape(len(keys), -1, keys.shape[1]).swapaxes(1, 2), mask)
        ),
        "reshape keeps the order of the numbers, and so mixes heads and tokens of q: swap the axes instead": (
            lambda q, keys, mask: ops.attention_scores(q.reshape(q.shape[1], q.shape[0], -1).swapaxes(0, 1), keys, mask)
        ),
    },
    small=small,
)
