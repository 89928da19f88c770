"""y = x Wᵀ for every way a weight is stored. The only file that knows storage; the math above it sees floats.

| weight's dtype | what it holds | computed in |
|---|---|---|
| float32, float64 | dense values | its own dtype |
| uint16 | bfloat16: the upper 16 bits of a float32 (NumPy has no bfloat16) | float32 |
| float16 | IEEE half precision | float32 |
| Int8 | int8 with one float32 scale for each row | float32 |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE_BYTES = 1 << 20  # of widened float32 rows: small enough to stay in a core's cache between widening and product


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


def is_packed(weight: Weight) -> bool:
    """Whether the weight is stored in 16 or 8 bits, to be widened before it is computed with."""
    return weight.dtype in (np.uint16, np.float16, np.int8)


def widen(packed: Weight, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of packed numbers, into `out` if given; dense arrays are returned as they are.

    Exact for 16 bits: a bfloat16 is the upper half of a float32, so that `<< 16` is right for every value, infinities and NaN
    included. The product of an Int8's value and scale is rounded to float32.
    """
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
    """The rows of the embedding that the tokens name; padding takes any.    tokens [..., T], weight [V, D] -> [..., T, D]"""
    return widen(weight[np.maximum(tokens, 0)])


def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Multiply by a weight matrix as torch.nn.Linear stores it.

    y = x Wᵀ        x [..., in], weight [out, in] -> [..., out]

    A packed weight is never widened whole: a tile of its rows at a time goes through one small buffer. A row's scale multiplies
    the result, which is shorter.
    """
    rows = x.reshape(-1, x.shape[-1])
    n_out, n_in = weight.shape
    packed = weight.values if isinstance(weight, Int8) else weight
    if not is_packed(weight):
        y = rows @ weight.T
    else:
        y = np.empty((len(rows), n_out), np.float32)
        tile = min(n_out, max(1, TILE_BYTES // (4 * n_in)))
        buffer = np.empty((tile, n_in), np.float32)
        for start in range(0, n_out, tile):
            part = packed[start : start + tile]
            y[:, start : start + tile] = rows @ widen(part, out=buffer[: len(part)]).T
    if isinstance(weight, Int8):
        y *= weight.scale
    return y.reshape(*x.shape[:-1], n_out)
