"""Hold weight matrices in the forms they are stored in. A form is one class; linear.py multiplies by any of them.

| array's dtype | form | what it holds | computed in |
|---|---|---|---|
| float32, float64 | Dense | the numbers themselves | its own dtype |
| uint16 | Bfloat16 | the upper 16 bits of a float32 (NumPy has no bfloat16) | float32 |
| float16 | Float16 | IEEE half precision | float32 |
| int8, with float32 scales | Int8 | one scale for each row | float32 |
| uint8 or int8, with scales | Grouped (grouped.py) | 4 or 8 bits, a scale for each group of columns | float32 |

Parameters are given as arrays, whose dtype says the form (form_of), or in a form. Every form has

    shape, dtype, ndim, size, nbytes
    rows(part), columns(part)    a part in the same form; rows also by an array of row numbers
    widen(out=None)              the numbers to compute with

and a packed form, which is multiplied tile by tile, also has sides(), tile() and finish(): see Packed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

UPPER_SHIFT, UPPER_HALF = np.uint32(16), np.uint32(0xFFFF0000)
HALF_BITS = np.uint32(0x8FFFE000)  # sign, lower exponent bits and mantissa of a float16 within a float32
HALF_SCALE, HALF_LIMIT = np.float32(2.0**112), np.float32(2.0**15)

Part = slice | np.ndarray  # row numbers


def native(array: np.ndarray) -> np.ndarray:
    """Return an array in this machine's byte order: itself if it is already, so that a mapped file stays mapped, else a copy.

    NumPy computes in either order, but `dtype == np.uint16` and `view` assume the native one: call this before them.
    """
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


class Form:
    """A weight as an array in which the numbers are stored."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray):
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape, as of an array."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype that the numbers are stored in."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return self.values.ndim

    @property
    def size(self) -> int:
        """Return how many numbers there are."""
        return self.values.size

    @property
    def nbytes(self) -> int:
        """Return how many bytes the numbers take, scales included."""
        return self.values.nbytes

    def rows(self, part: Part) -> Form:
        """Return some rows in the same form."""
        return type(self)(self.values[part])

    def columns(self, part: slice) -> Form:
        """Return some columns in the same form."""
        return type(self)(self.values[:, part])

    def widen(self, out: np.ndarray | None = None) -> np.ndarray:
        """Return the numbers to compute with, in `out` if given; a dense array itself otherwise."""
        raise NotImplementedError


class Dense(Form):
    """Numbers that are computed with as they are stored."""

    __slots__ = ()

    def widen(self, out: np.ndarray | None = None) -> np.ndarray:  # noqa: D102
        if out is None:
            return self.values
        np.copyto(out, self.values)
        return out


class Packed(Form):
    """Numbers in 16 bits or fewer, widened to float32 a tile at a time.

    x [N, in] times a tile of n rows is the sum over p of sides[p] @ tile[p]ᵀ: a form may split its columns into P sets, each
    contiguous once widened (P is 1 if it doesn't), and x likewise. A row's common factor is applied by finish().
    """

    __slots__ = ()

    def sides(self, x: np.ndarray) -> np.ndarray:
        """Split the columns of x as tile() splits those of the weight.    [N, in] -> [P, N, in / P]"""
        return np.ascontiguousarray(x[None])

    def tile(self, part: slice, n_sides: int, words: np.ndarray) -> np.ndarray:
        """Widen some rows into a buffer, which is overwritten.    words uint32 [n · in] -> float32 [P, n, in / P]"""
        rows = self.rows(part)
        return rows.widen(words.view(np.float32).reshape(rows.shape))[None]

    def finish(self, y: np.ndarray) -> np.ndarray:
        """Return the product [N, out] with the factors that tile() left out; y may be changed."""
        return y


class _SixteenBits(Packed):
    """Numbers of 16 bits. Two neighbours are split as one word of 32 bits, which is faster than widening each."""

    __slots__ = ()

    def sides(self, x: np.ndarray) -> np.ndarray:
        if self.shape[1] % 2 or self.values.strides[1] != self.values.itemsize:
            return super().sides(x)
        return np.ascontiguousarray(x.reshape(len(x), -1, 2).transpose(2, 0, 1))  # even columns, odd columns

    def tile(self, part: slice, n_sides: int, words: np.ndarray) -> np.ndarray:
        if n_sides == 1:
            return super().tile(part, n_sides, words)
        values = self.values[part]
        pair = words.reshape(2, len(values), -1)
        # The lower half of a word is the even column on a little-endian machine, and the odd one on a big-endian machine.
        self._take_apart(values.view(np.uint32), *(pair if sys.byteorder == "little" else pair[::-1]))
        return pair.view(np.float32)

    @staticmethod
    def _take_apart(packed: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
        raise NotImplementedError


class Bfloat16(_SixteenBits):
    """The upper halves of float32 numbers, as uint16."""

    __slots__ = ()

    def widen(self, out: np.ndarray | None = None) -> np.ndarray:
        """Return the float32 numbers, exactly: `<< 16` is right for every value, infinities and NaN included."""
        out = np.empty(self.shape, np.float32) if out is None else out
        bits = out.view(np.uint32)
        np.copyto(bits, self.values)
        np.left_shift(bits, UPPER_SHIFT, out=bits)
        return out

    @staticmethod
    def _take_apart(packed: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
        np.left_shift(packed, UPPER_SHIFT, out=lower)
        np.bitwise_and(packed, UPPER_HALF, out=upper)


class Float16(_SixteenBits):
    """IEEE half-precision numbers."""

    __slots__ = ()

    def widen(self, out: np.ndarray | None = None) -> np.ndarray:
        """Return the float32 numbers, exactly."""
        out = np.empty(self.shape, np.float32) if out is None else out
        np.copyto(out, self.values)
        return out

    def sides(self, x: np.ndarray) -> np.ndarray:
        """Split x, multiplied by 2^112 where the widened pairs are 2^-112 times as large as the numbers."""
        if np.max(np.abs(x), initial=0) < HALF_LIMIT and len(sides := super().sides(x)) == 2:
            sides *= HALF_SCALE
            return sides
        return Packed.sides(self, x)  # beyond the limit x would become infinite

    @staticmethod
    def _take_apart(packed: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
        """Move sign, 5 bits of exponent and 10 of mantissa to their places in a float32.

        An arithmetic shift copies the sign over the three additional bits of float32's exponent, and the mask clears them
        again. The result is the number times 2^-112, exactly, as the biases of the exponents are 15 and 127; also if
        subnormal.
        """
        packed, lower, upper = packed.view(np.int32), lower.view(np.int32), upper.view(np.int32)
        np.left_shift(packed, np.int32(16), out=lower)
        np.right_shift(lower, np.int32(3), out=lower)
        np.right_shift(packed, np.int32(3), out=upper)
        for half in (lower, upper):
            np.bitwise_and(half.view(np.uint32), HALF_BITS, out=half.view(np.uint32))


class Int8(Packed):
    """A matrix quantised row by row: row i is values[i] · scale[i].

    values  int8 [out, in], -127 to 127
    scale   float32 [out]
    """

    __slots__ = ("scale",)

    def __init__(self, values: np.ndarray, scale: np.ndarray):
        super().__init__(values)
        self.scale = scale

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.values.nbytes + self.scale.nbytes

    def rows(self, part: Part) -> Int8:  # noqa: D102
        return Int8(self.values[part], self.scale[part])

    def columns(self, part: slice) -> Int8:  # noqa: D102
        return Int8(self.values[:, part], self.scale)

    def widen(self, out: np.ndarray | None = None) -> np.ndarray:
        """Return the products of values and scales, rounded to float32."""
        out = np.empty(self.shape, np.float32) if out is None else out
        return np.multiply(self.values, native(self.scale)[:, None], out=out)

    def tile(self, part: slice, n_sides: int, words: np.ndarray) -> np.ndarray:
        """Widen the values only: scaling each number of the result is less work than scaling each number of the weight."""
        values = self.values[part]
        out = words.view(np.float32).reshape(1, *values.shape)
        np.copyto(out[0], values)
        return out

    def finish(self, y: np.ndarray) -> np.ndarray:
        """Multiply by each row's scale."""
        y *= self.scale
        return y


class Shard(Form):
    """One rank's part of a matrix: join() combines its product with the other ranks' into that of the whole matrix (ranks/).

    part   what this rank multiplies by
    table  the whole matrix, where its rows are looked up: an embedding that is the output matrix too
    """

    __slots__ = ("join", "part", "table")

    def __init__(self, part: Form, join: Callable[[np.ndarray], np.ndarray], table: Form | None = None):
        super().__init__(part.values)
        self.part, self.join, self.table = part, join, table

    def with_numbers(self, cast: Callable[[Form], Weight]) -> Shard:
        """Return the same part of the matrix whose numbers are cast."""
        return Shard(form_of(cast(self.part)), self.join, self.table and form_of(cast(self.table)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the part."""
        return self.part.shape

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.part.nbytes

    def rows(self, part: Part) -> Form:
        """Return rows of the whole matrix."""
        if self.table is None:
            raise ValueError("a rank has only its own part of this matrix: expected a model that one process computes")
        return self.table.rows(part)

    def columns(self, part: slice) -> Form:  # noqa: D102
        raise ValueError("a rank has only its own part of this matrix: expected a model that one process computes")

    def widen(self, out: np.ndarray | None = None) -> np.ndarray:  # noqa: D102
        return self.rows(slice(None)).widen(out)


Weight = np.ndarray | Form
FORMS = {"H": Bfloat16, "e": Float16}  # by an array's dtype.char


def form_of(weight: Weight) -> Form:
    """Return a weight as a Form, chosen by the dtype of an array; in native byte order."""
    if isinstance(weight, Form):
        return weight
    weight = native(weight)
    return FORMS.get(weight.dtype.char, Dense)(weight)


def is_packed(weight: Weight) -> bool:
    """Return whether the weight is stored in 16 bits or fewer, to be widened before it is computed with."""
    return isinstance(form_of(weight), Packed)


def widen(weight: Weight, out: np.ndarray | None = None) -> np.ndarray:
    """Return the numbers to compute with, in `out` if given: float32 of packed ones, and a dense array as it is."""
    form = form_of(weight)
    return form.widen(out) if isinstance(form, Packed) else form.values


class SideBySide(np.ndarray):
    """A dense matrix that shares a block of memory with others that multiply the same x: linears() multiplies the block.

    whole  all their rows    [sum of the others' and its own, in]
    start  where its own begin
    """

    whole: np.ndarray | None = None  # None in what is computed or cut from it
    start = 0

    @classmethod
    def of(cls, whole: np.ndarray, sizes: Sequence[int]) -> list[SideBySide]:
        """Cut a block into its matrices, by their numbers of rows."""
        parts, start = [], 0
        for size in sizes:
            part = whole[start : start + size].view(cls)
            part.whole, part.start = whole, start
            parts.append(part)
            start += size
        return parts


def block_of(weights: Sequence[Weight]) -> np.ndarray | None:
    """Return the matrix whose rows are those of all the weights, in this order and no others; None if there is none."""
    first, start = weights[0], 0
    if not isinstance(first, SideBySide) or (whole := first.whole) is None:
        return None
    for weight in weights:
        if not isinstance(weight, SideBySide) or weight.whole is not whole or weight.start != start:
            return None
        start += len(weight)
    return whole if start == len(whole) else None


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even, as uint16 bits; NaN stays NaN, too large numbers become infinite.

    Adding just under half a unit of the last place kept, plus one bit where that place is odd, carries into it exactly when
    the nearest bfloat16 is the next larger one.
    """
    bits = np.asarray(x, np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    quiet_nan = bits >> 16 | 0x0040  # the carry would change some NaN to zero or infinity
    return np.where(np.isnan(x), quiet_nan, nearest).astype(np.uint16)


def to_int8(x: np.ndarray) -> Int8:
    """Quantise each row to the 255 multiples of its scale that reach from -max|row| to max|row|.    float [out, in]

    scale = max|row| / 127, values = row / scale to the nearest, ties to even. A row of zeros has scale 0. Dividing in float64
    leaves no float32 on the wrong side of a tie.
    """
    x = np.asarray(x, np.float64)
    scale = (np.max(np.abs(x), axis=1) / 127).astype(np.float32)
    divisor = np.where(scale > 0, scale, 1)[:, None]
    values = np.rint(x / divisor)
    # They exceed 127 only where float32 has no scale near a 127th of numbers this small (below 1e-36).
    return Int8(np.clip(values, -127, 127).astype(np.int8), scale)
