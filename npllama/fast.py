"""Attention at the machine's pace. No mathematics of its own: tiles of queries, small enough that their scores stay in a core's
cache, are handed to the functions of ops.py, on all threads.

The results are those of ops.py within rounding, as products of matrices of other shapes are. Scores are never in memory whole,
and those of slots after a tile's last query aren't computed: half of a prompt's.
"""

from __future__ import annotations

import math

import numpy as np

from . import ops
from .threads import parallel

# glibc's malloc gives the memory of an array back to the system when it is freed, and touching memory anew costs more than
# computing with it, unless it has seen a larger one freed: then it keeps what is smaller. Untouched, this one costs nothing.
_ = np.empty(31 << 20, np.uint8)
del _

TILE = 1 << 18  # scores
SHARED = 1 << 17  # scores: waking a second thread costs more than it saves below


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """ops.attention_scores, softmax and attention_heads in one.

    q [..., T, H, K], keys, values [..., G, S, K], mask [..., 1, T, S] -> [..., T, H, K]

    The T queries are those of the last T slots, as in KVCache: none looks at a slot after its own.
    """
    *batch, T, H, K = q.shape
    G, S = keys.shape[-3:-1]
    R = H // G
    if q.size // K * S < SHARED:
        return ops.attention_heads(ops.softmax(ops.attention_scores(q, keys, mask)), values)
    size = max(8, TILE // (R * S))  # queries
    n_tiles = -(-T // size)
    y = np.empty_like(q)

    def work(i: int) -> None:
        *at, g, tile = np.unravel_index(i, (*batch, G, n_tiles))
        heads, group = slice(g * R, g * R + R), slice(g, g + 1)
        queries = slice(tile * size, min(T, tile * size + size))
        slots = slice(S - T + queries.stop)
        q_tile, mask_tile = q[(*at, queries, heads)], mask[(*at, slice(None), queries, slots)]
        scores = ops.attention_scores(q_tile, keys[(*at, group, slots)], mask_tile)
        y[(*at, queries, heads)] = ops.attention_heads(ops.softmax(scores), values[(*at, group, slots)])

    parallel(work, math.prod(batch) * G * n_tiles)
    return y
