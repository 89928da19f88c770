"""Compute y = x Wᵀ for every form of weight (weights.py) and every number of rows.

Reading the weight is what takes time: once from memory, whatever the number of rows. With dense weights, a single row of x goes
straight to BLAS, which reads the weight at the memory's bandwidth. Many rows are multiplied by BLAS too, each thread with a
part of the weight. A few rows are the problem: BLAS copies the whole weight into an order of its own first, so that
two rows cost as much as eight. Tiles small enough for its kernels that read in place avoid that. A packed weight is widened
tile by tile into a buffer that stays in a core's cache, and multiplied from there. benchmarks/README.md has figures.

In this file N is the number of rows of x: the tokens of all sequences of a batch.
"""

from __future__ import annotations

import functools
import math
import os
import threading

import numpy as np

from .grouped import Grouped
from .threads import n_threads, parallel
from .weights import Int8, Packed, Shard, Weight, block_of, form_of, is_packed, native, to_bfloat16, to_int8, widen

__all__ = ["Int8", "Weight", "embed", "is_packed", "linear", "linears", "native", "products", "to_bfloat16", "to_int8", "widen"]

FEW_ROWS = 16  # up to this many, a product is bound by reading the weight
IN_PLACE = 1_000_000  # multiplications: up to this many OpenBLAS multiplies small matrices without reordering them first
FEW_TILE = 64  # rows of a weight in one such product
SHARED = 1 << 20  # multiplications: below this, a second thread costs more than it saves
TILE = 1 << 20  # numbers of a packed weight that each of several threads widens at once


def embed(tokens: np.ndarray, weight: Weight) -> np.ndarray:
    """Return the rows of the embedding that the tokens name.    tokens [..., T], weight [V, D] -> [..., T, D]

    Padding takes row 0; nothing attends to it.
    """
    rows = form_of(weight).rows(np.maximum(tokens, 0).ravel())
    return np.ascontiguousarray(rows.widen()).reshape(*tokens.shape, -1)


def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Multiply by a weight matrix as torch.nn.Linear stores it.

    y = x Wᵀ        x [..., in], weight [out, in] -> [..., out]

    A packed weight is never widened whole. One in foreign byte order is converted at each call.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype.type is np.float16:  # x becomes float32: float16 could overflow in sides()
        rows = rows.astype(np.float32)
    form = form_of(weight)
    if isinstance(form, Shard):
        return form.join(linear(x, form.part))
    if isinstance(form, Grouped):
        y = _grouped_product(rows, form)
    elif isinstance(form, Packed):
        y = _packed_product(rows, form)
    elif len(rows) == 1:
        y = (np.asarray(form.values) @ rows[0])[None]
    elif len(rows) <= FEW_ROWS:
        y = _few_rows_product(rows, np.asarray(form.values))
    else:
        y = _many_rows_product(rows, np.asarray(form.values))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linears(x: np.ndarray, *weights: Weight) -> list[np.ndarray]:
    """Multiply the same x by each weight; as one product where the weights are adjacent in memory (layout.py)."""
    if (block := block_of(weights)) is None:
        return [linear(x, weight) for weight in weights]
    y, start = linear(x, block), 0
    parts: list[np.ndarray] = []
    for weight in weights:
        stop = start + weight.shape[0]
        parts.append(y[..., start:stop])
        start = stop
    return parts


def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the dot product of every row of x with every row of y.    x [..., N, K], y [..., S, K] -> [..., N, S]

    A few rows of x are transposed first: small products of that form read y in place.
    """
    if x.shape[-2] > FEW_ROWS:
        return x @ y.swapaxes(-1, -2)
    columns = np.ascontiguousarray(x.swapaxes(-1, -2))  # [..., K, N]
    out = np.empty((*y.shape[:-1], x.shape[-2]), np.result_type(x, y))  # [..., S, N]
    step = max(1, IN_PLACE // max(1, columns.shape[-2] * columns.shape[-1]))
    for start in range(0, y.shape[-2], step):
        part = slice(start, start + step)
        np.matmul(y[..., part, :], columns, out=out[..., part, :])
    return out.swapaxes(-1, -2)


def _few_rows_product(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply a few rows, the threads sharing tiles of the weight.    [N, in] by [out, in] -> [N, out]"""
    n_out = len(weight)
    y = np.empty((n_out, len(rows)), weight.dtype)
    n_parts = n_threads() if weight.size * len(rows) >= SHARED else 1
    size = -(-n_out // (n_parts * FEW_TILE)) * FEW_TILE
    # In C order: where both matrices are transposed, OpenBLAS 0.3.31's kernels for AVX-512 are not safe in two threads at once.
    columns = np.ascontiguousarray(rows.T)

    def work(i: int) -> None:
        part = slice(i * size, (i + 1) * size)
        few_columns(weight[part], columns, out=y[part])

    parallel(work, -(-n_out // size))
    return np.ascontiguousarray(y.T)


def _many_rows_product(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply many rows, our threads sharing parts of the weight.    [N, in] by [out, in] -> [N, out]

    BLAS's own threads spin for a while after a product, on the cores that attention needs next.
    """
    n_out = len(weight)
    y = np.empty((len(rows), n_out), weight.dtype)
    size = -(-n_out // n_threads())

    def work(i: int) -> None:
        part = slice(i * size, i * size + size)
        np.matmul(rows, weight[part].T, out=y[:, part])

    parallel(work, -(-n_out // size))
    return y


def few_columns(weight: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """Multiply a weight [..., out, in] by columns [..., in, N] for small N, as one stack of tiles.    out [..., out, N]

    The last two axes of the weight may be in memory in either order: splitting the first of them always gives a view.
    """
    *stack, n_out, n_in = weight.shape
    N = columns.shape[-1]
    tile = min(FEW_TILE, 1 << max(0, int(math.log2(max(1, IN_PLACE // (n_in * N))))))
    whole = n_out // tile * tile
    if whole:
        tiles = weight[..., :whole, :].reshape(*stack, -1, tile, n_in)
        np.matmul(tiles, columns[..., None, :, :], out=out[..., :whole, :].reshape(*stack, -1, tile, N))
    if whole < n_out:
        np.matmul(weight[..., whole:, :], columns, out=out[..., whole:, :])


_buffers = threading.local()


def _buffer(size: int) -> np.ndarray:
    """Return this thread's buffer of `size` uint32, to be overwritten. It is kept, since new memory is slower to write to."""
    if getattr(_buffers, "words", np.empty(0)).size < size:
        _buffers.words = np.empty(size, np.uint32)
    return _buffers.words[:size]


@functools.cache
def tile_size(n_threads: int) -> int:
    """Return how many numbers of a packed weight are widened at once.

    One thread widens what takes half of its second-level cache as float32. Several would wait for Python's lock after
    each tile of that size, so theirs are larger.
    """
    if n_threads > 1:
        return TILE
    try:
        cache = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system, or one that doesn't know the name
        cache = 0
    return (cache if cache > 0 else 1 << 20) // 2 // 4


def _packed_product(rows: np.ndarray, weight: Packed) -> np.ndarray:
    """Multiply by a packed weight, the threads sharing its tiles.    [N, in] by [out, in] -> float32 [N, out]"""
    (n_out, n_in), N, n = weight.shape, len(rows), n_threads()
    sides = weight.sides(rows)  # [P, N, in / P]
    columns = sides.swapaxes(-1, -2)
    n_tiles = max(1, round(weight.size / tile_size(n)))
    if weight.size * N >= SHARED:
        n_tiles = -(-n_tiles // n) * n
    size = -(-n_out // n_tiles)
    few = N <= FEW_ROWS
    y = np.empty((n_out, N) if few else (N, n_out), np.float32)

    def work(i: int) -> None:
        part = slice(i * size, min(n_out, (i + 1) * size))
        tile = weight.tile(part, len(sides), _buffer((part.stop - part.start) * n_in))  # [P, size, in / P]
        if few:
            summands = np.empty((*tile.shape[:2], N), np.float32)
            few_columns(tile, columns, out=summands)
            np.add.reduce(summands, axis=0, out=y[part])
        else:
            np.add.reduce(sides @ tile.swapaxes(-1, -2), axis=0, out=y[:, part])

    parallel(work, -(-n_out // size))
    return weight.finish(np.ascontiguousarray(y.T) if few else y)


def _grouped_product(rows: np.ndarray, weight: Grouped) -> np.ndarray:
    """Multiply by a weight quantised in groups, the threads sharing its tiles.    [N, in] by [out, in] -> float32 [N, out]

    For a few rows of x, q is multiplied as it is stored, and each group's partial sums are multiplied by its scales: less work
    than scaling each number of the weight. A tile is as wide as it can be and has a few of the groups, since the slow loops run
    along its width. For many rows the weight is widened first, all groups of a tile, for one large product.
    """
    (n_out, n_in), N, n = weight.shape, len(rows), n_threads()
    group, few = weight.grouping.group, N <= FEW_ROWS
    tile = (tile_size(n) if n == 1 else tile_size(n) // 2) if few else TILE  # q and x take part of the cache too
    size = max(1, tile // (group if few else n_in))
    n_parts = -(-n_out // size)
    if weight.size * N >= SHARED:
        n_parts = -(-n_parts // n) * n
    size = -(-n_out // n_parts)
    n_groups = max(1, tile // (group * size)) if few else n_in // group
    x = np.ascontiguousarray(rows.reshape(N, -1, group).swapaxes(0, 1))  # [g, N, group]
    y = np.empty((N, n_out), np.float32)

    def work(i: int) -> None:
        part = weight.rows(slice(i * size, (i + 1) * size))
        out = y[:, i * size : (i + 1) * size]
        numbers = _buffer(n_groups * group * size).view(np.float32)
        if few:
            part.multiply(x, numbers, out)
        else:
            wide = numbers[: part.size].reshape(-1, group, len(out.T))
            part.fill(wide, part.all_levels())
            np.matmul(rows, wide.reshape(n_in, -1), out=out)

    parallel(work, -(-n_out // size))
    return y
