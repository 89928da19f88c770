"""Compute a pass without a tap faster: attention in tiles, and a long prompt shared among the threads.

Attention is computed in tiles of queries, small enough that their scores stay in a core's cache: the whole score matrix is
never in memory, and scores of keys after a tile's last query, about half of a prompt's, are never computed. Unlike
FlashAttention (Dao et al. 2022, arXiv:2205.14135), a tile of queries has all its keys at once, so no running maximum is needed.
Arithmetic is done on the smaller arrays: queries are scaled instead of scores, and, as in FlashAttention-2 (Dao 2023,
arXiv:2307.08691), the output is divided by the sum of weights instead of each weight. The results are those of ops.py within
rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .. import ops
from .threads import n_threads, parallel
from .weights import Shard

if TYPE_CHECKING:
    from ..scope import Ops, Scope

# glibc returns large arrays to the system when they are freed, and touching fresh memory costs more than computing with it.
# Freeing one block of 31 MiB raises its threshold, so that smaller arrays reuse memory. The block itself is never touched.
_ = np.empty(31 << 20, np.uint8)
del _

TILE = 1 << 19  # scores
QUERIES = 64  # with fewer in a tile BLAS multiplies slowly: a tile takes several key heads only if it can have as many
SHARES = 4  # tiles per thread, at least: the last to end keeps the other threads waiting
SHARED = 1 << 17  # scores: below this, a second thread costs more than it saves
TOKENS = 256  # per thread, at least: with fewer, BLAS spends longer packing the weights than multiplying


def by_token(f: Callable[[np.ndarray, Scope], np.ndarray]) -> Callable[[np.ndarray, Scope], np.ndarray]:
    """Share the tokens of a long prompt among the threads, for a function that transforms each token by itself.

    x [..., T, D] -> like x. Tokens are not shared out if there is a tap, which gets whole activations, or if f waits for
    other ranks, since all ranks have to form their sums in the same order.
    """

    @functools.wraps(f)
    def shared(x: np.ndarray, s: Scope) -> np.ndarray:
        rows = x.reshape(-1, x.shape[-1])
        size = -(-len(rows) // n_threads())
        joined = any(isinstance(s.params.get(f"{s.prefix}{name}.weight"), Shard) for name in ("w1", "w2", "w3"))
        if size < TOKENS or size == len(rows) or s.tap is not None or joined:
            return f(x, s)
        y = np.empty_like(rows)

        def work(i: int) -> None:
            part = slice(i * size, i * size + size)
            y[part] = f(rows[part], s)

        parallel(work, -(-len(rows) // size))
        return y.reshape(x.shape)

    return shared


def rope_rotation(positions: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray]:
    """Return ops.rope_rotation's cosines and sines as one complex array, computed once a pass instead of twice a layer."""
    cos, sin = ops.rope_rotation(positions, frequencies)
    return (cos + 1j * sin,)


def rope(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Rotate as ops.rope does, by rope_rotation's complex numbers."""
    return (np.ascontiguousarray(x).view(rotation.dtype) * rotation).view(x.dtype)


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray, s: Scope) -> np.ndarray:
    """Compute model.attention without keeping scores and weights: a tap gets the heads only."""
    return s.see("heads", tiled_attention(q, keys, values, mask))


def tiled_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute ops.attention_scores, softmax and attention_heads in one.

    q [..., T, H, K], keys, values [..., G, S, K], mask [..., 1, T, S] -> [..., T, H, K]

    Query t attends to no slot after S - T + t: in KVCache, a row's T queries are those of its last T slots, and no row fills
    more than S.
    """
    *batch, T, H, K = q.shape
    G, S = keys.shape[-3:-1]
    R = H // G
    if q.size // K * S < SHARED:
        return ops.attention_heads(ops.softmax(ops.attention_scores(q, keys, mask)), values)
    tile = min(TILE, q.size // K * S // (SHARES * n_threads()))
    n_groups = min(G, max(1, tile // (QUERIES * R * S)))  # key heads in a tile
    n_parts = -(-G // n_groups)
    n_tiles = -(-T // max(8, tile // (n_groups * R * S)))
    size = -(-T // n_tiles)  # queries
    q = q / math.sqrt(K)
    y = np.empty_like(q)
    # Without padding, each query of a tile may attend to all slots before the tile's first query.
    padded = any(mask[..., start : start + size, : S - T + start].any() for start in range(0, T, size))

    def work(i: int) -> None:
        tile, *at, part = np.unravel_index(i, (n_tiles, *batch, n_parts))
        row, start = tuple(at), (n_tiles - 1 - tile) * size  # of the batch; the last tile, with most slots, comes first
        tokens, groups = slice(start, min(T, start + size)), slice(part * n_groups, min(G, part * n_groups + n_groups))
        heads = slice(groups.start * R, groups.stop * R)
        first, stop = S - T + tokens.start, S - T + tokens.stop  # slots: of the first query, and after the last
        hidden = mask[row][:, tokens, 0 if padded else first : stop]  # all others are visible
        k, v = keys[row][groups, :stop], values[row][groups, :stop]
        y[row][tokens, heads] = _attend(q[row][tokens, heads], k, v, hidden)

    parallel(work, n_tiles * math.prod(batch) * n_parts)
    return y


def _attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute attention for queries already divided by sqrt(K); the mask covers the last slots, all others are visible.

    q [..., T, H, K], keys, values [..., G, S, K], mask [..., 1, T, up to S] -> [..., T, H, K]
    """
    S = keys.shape[-2]
    scores = ops.query_key_products(q, keys)  # [..., H, T, S]
    scores[..., S - mask.shape[-1] :] += mask
    scores -= scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores, out=scores)
    y = ops.attention_heads(weights, values)
    y /= (weights @ np.ones(S, q.dtype)).swapaxes(-1, -2)[..., None]  # sums of a row, by BLAS
    return y


def faster(plain: Ops) -> Ops:
    """Return the operations with those of this module in place of their plain forms."""
    feed_forward = by_token(plain.feed_forward)
    whole = replace(plain, attention_scores=None, softmax=None, attention_heads=None)  # type: ignore[arg-type]  # none is called
    return replace(whole, attention=attention, feed_forward=feed_forward, rope_rotation=rope_rotation, rope=rope)
