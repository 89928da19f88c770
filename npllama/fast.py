"""The forward pass at the machine's pace, when nobody watches what is in between: a long prompt is shared among the threads.

Attention goes by tiles of queries, small enough that their scores stay in a core's cache: they are never in memory whole, and
scores after a tile's last query, about half of a prompt's, are never computed. Unlike FlashAttention (Dao et al. 2022,
arXiv:2205.14135), a tile of queries sees all its keys at once, so no running maximum is needed. Arithmetic is moved to where
the numbers are fewer: queries are scaled instead of scores, and, as in FlashAttention-2 (Dao 2023, arXiv:2307.08691), the
output is divided by the sum of weights instead of each weight. The results are those of ops.py within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from . import ops
from .linear import products
from .threads import n_threads, parallel

# glibc unmaps large arrays when they are freed, and touching fresh memory costs more than computing with it. Freeing one block
# of 31 MiB raises its threshold, so that the memory of smaller arrays is reused. Untouched, this block costs nothing.
_ = np.empty(31 << 20, np.uint8)
del _

TILE = 1 << 18  # scores
SHARED = 1 << 17  # scores: below this, a second thread costs more than it saves
TOKENS = 256  # per thread, at least: with fewer, BLAS spends longer packing the weights than multiplying


def by_token(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """f(x) of a function that takes each token by itself, tokens shared among the threads.    x [..., T, D] -> like x"""
    rows = x.reshape(-1, x.shape[-1])
    size = -(-len(rows) // n_threads())
    if size < TOKENS or size == len(rows):
        return f(x)
    y = np.empty_like(rows)

    def work(i: int) -> None:
        part = slice(i * size, i * size + size)
        y[part] = f(rows[part])

    parallel(work, -(-len(rows) // size))
    return y.reshape(x.shape)


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
    q = q / math.sqrt(K)
    y, ones = np.empty_like(q), np.ones(S, q.dtype)
    # Without padding, what came before a tile's first query is hidden from none of its queries.
    padded = any(mask[..., start : start + size, : S - T + start].any() for start in range(0, T, size))

    def work(i: int) -> None:
        *at, g, tile = np.unravel_index(i, (*batch, G, n_tiles))
        tokens, heads = slice(tile * size, min(T, tile * size + size)), slice(g * R, g * R + R)
        first, stop = S - T + tokens.start, S - T + tokens.stop  # slots: of the first query, and after the last
        queries = q[(*at, tokens, heads)].swapaxes(0, 1).reshape(-1, K)  # those of one head after another
        scores = products(queries, keys[(*at, g, slice(stop))])
        hidden = slice(0 if padded else first, stop)  # slots that may be, to some
        scores.reshape(R, -1, stop)[..., hidden] += mask[(*at, slice(None), tokens, hidden)]
        scores -= np.max(scores, axis=-1, keepdims=True)
        weights = np.exp(scores, out=scores)
        y_tile = weights @ values[(*at, g, slice(stop))]
        y_tile /= (weights @ ones[:stop])[:, None]
        y[(*at, tokens, heads)] = y_tile.reshape(R, -1, K).swapaxes(0, 1)

    parallel(work, math.prod(batch) * G * n_tiles)
    return y
