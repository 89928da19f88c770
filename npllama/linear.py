"""y = x Wᵀ for every way a weight is stored and every number of rows. The only file that knows storage; the math above it sees
floats.

| weight's dtype | what it holds | computed in |
|---|---|---|
| float32, float64 | dense values | its own dtype |
| uint16 | bfloat16: the upper 16 bits of a float32 (NumPy has no bfloat16) | float32 |
| float16 | IEEE half precision | float32 |
| Int8 | int8 with one float32 scale for each row | float32 |

What costs is reading the weight: once from memory, whatever the number of rows. With dense weights, a single row of x goes
straight to BLAS, which reads the weight as fast as the machine does. Many rows are multiplied by BLAS too, each of our threads
taking a part of the weight. A few rows are the problem: BLAS copies the whole weight into an order of its own first, so that
two rows cost as much as eight. Tiles small enough for its kernels that read in place avoid that. A packed weight is widened
tile by tile into a buffer that stays in a core's cache, and multiplied from there. benchmarks/README.md has figures.

N is the number of rows of x, here alone: the tokens of all sequences of a batch.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .threads import n_threads, parallel

FEW_ROWS = 16  # up to this many, a product is bound by reading the weight
IN_PLACE = 1_000_000  # multiplications: up to this many OpenBLAS multiplies small matrices without reordering them first
FEW_TILE = 64  # rows of a weight in one such product
UPPER_SHIFT, UPPER_HALF = np.uint32(16), np.uint32(0xFFFF0000)
HALF_BITS = np.uint32(0x8FFFE000)  # sign, lower exponent bits and mantissa of a float16 within a float32
HALF_SCALE, HALF_LIMIT = np.float32(2.0**112), np.float32(2.0**15)
SHARED = 1 << 20  # multiplications: below this, a second thread costs more than it saves
TILE = 1 << 20  # elements widened at once: large enough that Python's overhead per tile doesn't show


@dataclass(frozen=True, eq=False)
class Int8:
    """A matrix quantized row by row: row i is values[i] · scale[i]. It has an array's attributes, not its operators."""

    values: np.ndarray  # int8 [out, in], -127 to 127
    scale: np.ndarray  # float32 [out]

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)
    ndim = property(lambda self: self.values.ndim)
    size = property(lambda self: self.values.size)
    nbytes = property(lambda self: self.values.nbytes + self.scale.nbytes)


Weight = np.ndarray | Int8


def native(array: Weight) -> Weight:
    """Return an array in this machine's byte order: itself where it is, which a mapped file stays mapped by, else a copy.

    NumPy computes in either order, but `dtype == np.uint16` and `view` know one: whoever uses them begins with this.
    """
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def is_packed(weight: Weight) -> bool:
    """Whether the weight is stored in 16 or 8 bits, to be widened before it is computed with."""
    return weight.dtype.char in "Heb"  # uint16, float16, int8, in any byte order


def widen(packed: Weight, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of packed numbers, into `out` if given; dense arrays are returned as they are, in native byte order.

    Exact for 16 bits: a bfloat16 is the upper half of a float32, so that `<< 16` is right for every value, infinities and NaN
    included. The product of an Int8's value and scale is rounded to float32.
    """
    packed = native(packed)
    if not is_packed(packed):
        return packed
    if out is None:
        out = np.empty(packed.shape, np.float32)
    if isinstance(packed, Int8):
        np.multiply(packed.values, packed.scale[:, None], out=out)
    elif packed.dtype == np.uint16:
        bits = out.view(np.uint32)
        np.copyto(bits, packed)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, packed)
    return out


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as uint16 bits; NaN stays NaN, what is too large becomes infinite.

    Adding just under half a unit of the last place kept, plus one bit where that place is odd, carries into it exactly when
    the nearest lies above.
    """
    bits = np.asarray(x, np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    quiet_nan = bits >> 16 | 0x0040  # the carry would turn some NaN into zero or infinity
    return np.where(np.isnan(x), quiet_nan, nearest).astype(np.uint16)


def to_int8(x: np.ndarray) -> Int8:
    """Quantize each row to the 255 multiples of its scale that reach from -max|row| to max|row|.    float [out, in]

    scale = max|row| / 127, values = row / scale to the nearest, ties to even. A row of zeros has scale 0. Dividing in float64
    leaves no float32 on the wrong side of a tie.
    """
    x = np.asarray(x, np.float64)
    scale = (np.max(np.abs(x), axis=1) / 127).astype(np.float32)
    divisor = np.where(scale > 0, scale, 1)[:, None]
    values = np.rint(x / divisor)
    # Only where float32 has no scale near a 127th of numbers this small (below 1e-36) can they lie beyond.
    return Int8(np.clip(values, -127, 127).astype(np.int8), scale)


def embed(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The rows of the embedding that the tokens name.    tokens [..., T], weight [V, D] -> [..., T, D]

    Padding takes row 0; nothing attends to it.
    """
    return widen(np.ascontiguousarray(weight[np.maximum(tokens, 0)]))


def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Multiply by a weight matrix as torch.nn.Linear stores it.

    y = x Wᵀ        x [..., in], weight [out, in] -> [..., out]

    A packed weight is never widened whole. An int8 row's scale is applied to the result: `out` numbers for each row of x
    instead of `out·in`. A weight in foreign byte order is converted at each call.
    """
    weight = native(weight)
    rows = x.reshape(-1, x.shape[-1])
    if is_packed(weight):
        y = _packed_product(rows, weight)
    elif len(rows) == 1:
        y = (weight @ rows[0])[None]
    elif len(rows) <= FEW_ROWS:
        y = _few_rows_product(rows, weight)
    else:
        y = _many_rows_product(rows, weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def linears(x: np.ndarray, *weights: Weight) -> list[np.ndarray]:
    """linear() of the same x by each weight; as one product where layout.py has laid them side by side."""
    if (whole := _as_one(weights)) is None:
        return [linear(x, weight) for weight in weights]
    y, parts, start = linear(x, whole), [], 0
    for weight in weights:
        parts.append(y[..., start : start + len(weight)])
        start += len(weight)
    return parts


def _as_one(weights: Sequence[Weight]) -> np.ndarray | None:
    """The matrix whose rows are those of all the weights, if they are its rows, in this order and all of them."""
    block = getattr(weights[0], "base", None)
    if not isinstance(block, np.ndarray) or block.ndim != 2:
        return None
    n_out, address = 0, _address(block)
    for weight in weights:
        if weight.base is not block or weight.strides != block.strides[::-1]:
            return None
        if _address(weight) != address + n_out * block.strides[1]:
            return None
        n_out += len(weight)
    return block.T if block.shape == (weights[0].shape[1], n_out) else None


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The dot product of every row of x with every row of y.    x [..., N, K], y [..., S, K] -> [..., N, S]

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
    """[N, in] by [out, in] -> [N, out] for a few rows, tiles of the weight shared among the threads."""
    n_out = len(weight)
    y = np.empty((n_out, len(rows)), weight.dtype)
    n_parts = n_threads() if weight.size * len(rows) >= SHARED else 1
    size = -(-n_out // (n_parts * FEW_TILE)) * FEW_TILE
    # In C order: where both matrices are transposed, OpenBLAS 0.3.31's kernels for AVX-512 are not safe in two threads at once.
    columns = np.ascontiguousarray(rows.T)

    def work(i: int) -> None:
        part = slice(i * size, (i + 1) * size)
        _few_columns(weight[part], columns, out=y[part])

    parallel(work, -(-n_out // size))
    return np.ascontiguousarray(y.T)


def _many_rows_product(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[N, in] by [out, in] -> [N, out], parts of the weight shared among our threads.

    BLAS would do it in its own threads as well, but these spin for a while when they are done, in the way of those that do the
    attention next.
    """
    n_out = len(weight)
    y = np.empty((len(rows), n_out), weight.dtype)
    size = -(-n_out // n_threads())

    def work(i: int) -> None:
        part = slice(i * size, i * size + size)
        np.matmul(rows, weight[part].T, out=y[:, part])

    parallel(work, -(-n_out // size))
    return y


def _few_columns(weight: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """weight [..., out, in] @ columns [..., in, N] for small N, as one stack of tiles.    out [..., out, N]

    The last two axes of the weight may be in memory in either order: taken apart, the first of them stays a view.
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
    """This thread's buffer of at least so many uint32, to be overwritten: made once, since new memory costs more to touch."""
    if getattr(_buffers, "words", np.empty(0)).size < size:
        _buffers.words = np.empty(size, np.uint32)
    return _buffers.words[:size]


def _packed_product(rows: np.ndarray, weight: Weight) -> np.ndarray:
    """[N, in] by a packed [out, in] -> [N, out] in float32, tiles shared among the threads."""
    values = weight.values if isinstance(weight, Int8) else weight
    n_out, N = len(values), len(rows)
    in_pairs = _comes_in_pairs(values, rows)
    sides = rows.reshape(N, -1, 2).transpose(2, 0, 1) if in_pairs else rows[None]  # [P, N, in / P]
    sides = sides * HALF_SCALE if in_pairs and values.dtype == np.float16 else np.ascontiguousarray(sides)
    columns = sides.swapaxes(-1, -2)
    n_tiles = max(1, round(values.size / TILE))
    if values.size * N >= SHARED:
        n_tiles = -(-n_tiles // n_threads()) * n_threads()
    size = -(-n_out // n_tiles)
    few = N <= FEW_ROWS
    y = np.empty((n_out, N) if few else (N, n_out), np.float32)

    def work(i: int) -> None:
        part = slice(i * size, (i + 1) * size)
        tile = _widen_tile(values[part], in_pairs)  # [P, size, in / P]
        if few:
            summands = np.empty((*tile.shape[:2], N), np.float32)
            _few_columns(tile, columns, out=summands)
            np.add.reduce(summands, axis=0, out=y[part])
        else:
            np.add.reduce(sides @ tile.swapaxes(-1, -2), axis=0, out=y[:, part])

    parallel(work, -(-n_out // size))
    y = np.ascontiguousarray(y.T) if few else y
    if isinstance(weight, Int8):
        y *= weight.scale
    return y


def _comes_in_pairs(values: np.ndarray, rows: np.ndarray) -> bool:
    """Whether two neighbours of 16 bits can be taken apart as one word of 32, which is faster than widening each."""
    if values.dtype == np.int8 or values.shape[1] % 2 or values.strides[1] != values.itemsize:
        return False
    # Halves come out 2^-112 times too small, so that x is taken as many times too large; beyond this it would be infinite.
    return values.dtype == np.uint16 or bool(np.max(np.abs(rows)) < HALF_LIMIT)


def _widen_tile(values: np.ndarray, in_pairs: bool) -> np.ndarray:
    """A tile as float32 in this thread's buffer: [2, n, in / 2], the even columns before the odd; [1, n, in] if not in pairs.

    Of two bfloat16 in a word one is the upper half already, and the other, the lower one, a shift away; the lower one is the
    even one in a little-endian word, and the odd one in a big-endian word. A float16 has
    its sign, 5 bits of exponent and 10 of mantissa moved to where float32 has them: an arithmetic shift copies the sign over
    the three bits that float32's exponent has more, and the mask clears them again. What comes out is the number times 2^-112,
    exactly, as the two exponents are counted from 15 and 127; subnormal ones included.
    """
    n, n_in = values.shape
    words = _buffer(values.size)
    if not in_pairs:
        return widen(values, out=words.view(np.float32).reshape(n, n_in))[None]
    pair = words.reshape(2, n, n_in // 2)
    lower, upper = pair if sys.byteorder == "little" else pair[::-1]
    if values.dtype == np.uint16:
        packed = values.view(np.uint32)
        np.left_shift(packed, UPPER_SHIFT, out=lower)
        np.bitwise_and(packed, UPPER_HALF, out=upper)
    else:
        packed, lower, upper = values.view(np.int32), lower.view(np.int32), upper.view(np.int32)
        np.left_shift(packed, np.int32(16), out=lower)
        np.right_shift(lower, np.int32(3), out=lower)
        np.right_shift(packed, np.int32(3), out=upper)
        np.bitwise_and(pair, HALF_BITS, out=pair)
    return pair.view(np.float32)
