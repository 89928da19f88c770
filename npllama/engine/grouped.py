"""Multiply by matrices quantised in groups of columns, as most quantised checkpoints are: w = scale · (q − zero) + offset.

q has 4 or 8 bits; each row has one scale, and perhaps one offset, for every `group` columns. In two levels (llama.cpp's
K-quants) scales and offsets are themselves small whole numbers times a unit, in float16, that several groups share:

    scale[g] = unit[0, g // u] · s[g]        offset[g] = unit[1, g // u] · t[g]

Both products are exact in float32, and so is scale · (q − zero) wherever scale has at most 16 significant bits: the sum with
the offset is all that rounds, as in the libraries that dequantise such files.

Every array has the rows of the weight on its last axis, which is long: products and scales then run along it.
g = in / group is the number of groups.

| array | shape | what it holds |
|---|---|---|
| values, 8 bits | int8 [g, group, out] | q |
| values, 4 bits | uint8 [g, group / 2, out] | lower four bits: q of the group's first half; upper: of its second half |
| scale | [1 or 2, g, out] | the scale, and the offset where there is one |
| unit | float16 [1 or 2, g / u, out] | what scale and offset are multiples of; in two levels only |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from .weights import Packed, Part, native

HALF = np.dtype("<f2")
SCALES: dict[str, np.dtype] = {  # little-endian, as in files
    "float32": np.dtype("<f4"),
    "float16": HALF,
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
}
HALF_BITS, HALF_SCALE = np.int32(np.uint32(0x8FFFE000).view(np.int32)), np.float32(2.0**112)
HALF_MAGNITUDE, LARGEST_HALF = np.uint16(0x7FFF), 0x7BFF
IN_PLACE = 1_000_000  # multiplications of one matrix product: linear.py says why
INT4_LIMIT = 15 * 65504 // 2  # up to this magnitude a group has a float16 scale, whatever its other numbers are


@dataclass(frozen=True)
class Grouping:
    """The way a matrix is quantised in groups. Raises ValueError for an impossible one.

    bits        4: q is 0 to 15; 8: q is -128 to 127
    group       columns that share a scale; a whole row is a multiple
    scale       dtype of the scales: float32, float16, bfloat16; int8 or uint8 in two levels
    offset      whether groups have an offset too
    zero        the whole number that is subtracted from every q
    unit        groups that share a unit, in two levels; 0: one level
    rows_first  in files: the rows on the first axis, so that single rows are read quickly (an embedding), not on the last
    """

    bits: int
    group: int
    scale: str
    offset: bool = False
    zero: int = 0
    unit: int = 0
    rows_first: bool = False

    def __post_init__(self) -> None:
        wanted = {"bits": int, "group": int, "scale": str, "offset": bool, "zero": int, "unit": int, "rows_first": bool}
        for name, kind in wanted.items():
            if type(value := getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {value!r:.40}, expected {kind.__name__}")
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, expected 4 or 8")
        if self.group < 2 or self.group % 2:
            raise ValueError(f"group is {self.group}, expected an even number of columns")
        if abs(self.zero) > 255 or self.unit < 0:
            raise ValueError(f"zero is {self.zero} and unit {self.unit}, expected -255 to 255 and 0 or more")
        scales = ("int8", "uint8") if self.unit else ("float32", "float16", "bfloat16")
        if self.scale not in scales:
            raise ValueError(f"scale is {self.scale!r:.40}, expected {', '.join(scales)} with unit {self.unit}")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Grouping:
        """Return the grouping that a manifest describes."""
        if set(values) != (names := {field.name for field in fields(cls)}):
            raise ValueError(f"it has {', '.join(map(str, values))}, expected {', '.join(sorted(names))}")
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks their types

    @property
    def most(self) -> int:
        """Return the largest magnitude that q − zero can have."""
        least, largest = (0, 15) if self.bits == 4 else (-128, 127)
        return max(abs(least - self.zero), abs(largest - self.zero))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless a matrix of this shape can be quantised so: its rows are whole groups, and whole units."""
        step = self.group * max(1, self.unit)
        if len(shape) != 2 or shape[1] % step:
            raise ValueError(f"{list(shape)} can't be quantised in groups, expected rows of a multiple of {step} numbers")

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return the shape and dtype of each array that holds a matrix [out, in], in the order of Grouped.parts().

        As they are in files: the rows first where rows_first says so.
        """
        self.check(shape)
        n_out, n_groups, n_levels = shape[0], shape[1] // self.group, 1 + self.offset
        found = {
            "values": ((n_groups, self.group * self.bits // 8, n_out), np.dtype("u1" if self.bits == 4 else "i1")),
            "scale": ((n_levels, n_groups, n_out), SCALES[self.scale]),
        }
        if self.unit:
            found["unit"] = ((n_levels, n_groups // self.unit, n_out), HALF)
        return {name: ((s[-1], *s[:-1]) if self.rows_first else s, dtype) for name, (s, dtype) in found.items()}

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes a matrix of this shape takes, scales included."""
        return sum(math.prod(part) * dtype.itemsize for part, dtype in self.parts(shape).values())


INT4 = Grouping(bits=4, group=32, scale="float16", offset=True)  # what to_int4 makes


class Grouped(Packed):
    """A matrix quantised in groups; its arrays as the module's table lists them."""

    __slots__ = ("grouping", "scale", "unit")

    def __init__(self, grouping: Grouping, values: np.ndarray, scale: np.ndarray, unit: np.ndarray | None = None):
        super().__init__(values)
        self.grouping, self.scale, self.unit = grouping, scale, unit

    @classmethod
    def of(cls, grouping: Grouping, q: np.ndarray, scale: np.ndarray, unit: np.ndarray | None = None) -> Grouped:
        """Pack rows that are quantised already. Converters call this for each block of rows that they read.

        q       whole numbers [n, in]: 0 to 15 (uint8) for 4 bits, -128 to 127 (int8) for 8
        scale   [1 or 2, n, in / group] in the dtype that grouping.scale names (bfloat16 as uint16): scales, then offsets
        unit    float16 [1 or 2, n, in / group / grouping.unit]; in two levels only
        """
        n, n_in = q.shape
        grouping.check(q.shape)
        columns = q.reshape(n, n_in // grouping.group, grouping.group).transpose(1, 2, 0)
        if grouping.bits == 4:
            half = grouping.group // 2
            columns = columns[:, :half] | columns[:, half:] << np.uint8(4)
        scale, unit = scale.swapaxes(1, 2), None if unit is None else unit.swapaxes(1, 2)
        if not grouping.rows_first:  # not in C order, a matrix takes five times as long to multiply by
            columns, scale = np.ascontiguousarray(columns), np.ascontiguousarray(scale)
            unit = None if unit is None else np.ascontiguousarray(unit)
        form = cls(grouping, columns, scale, unit)
        for (name, part), (shape, dtype) in zip(form.parts().items(), grouping.parts(q.shape).values(), strict=True):
            expected = (*shape[1:], shape[0]) if grouping.rows_first else shape
            if part.shape != expected or part.dtype.newbyteorder("=") != dtype.newbyteorder("="):
                raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, expected {dtype} {list(expected)}")
        return form

    def parts(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names, the rows on the last axis of each."""
        found = {"values": self.values, "scale": self.scale}
        return found if self.unit is None else found | {"unit": self.unit}

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.values.shape[-1], self.scale.shape[1] * self.grouping.group

    @property
    def ndim(self) -> int:  # noqa: D102
        return 2

    @property
    def size(self) -> int:  # noqa: D102
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:  # noqa: D102
        return sum(part.nbytes for part in self.parts().values())

    def rows(self, part: Part) -> Grouped:  # noqa: D102
        unit = None if self.unit is None else self.unit[..., part]
        return Grouped(self.grouping, self.values[..., part], self.scale[..., part], unit)

    def columns(self, part: slice) -> Grouped:
        """Return some columns; where they cut a group or a unit, in smaller groups with the same scales."""
        start, stop, step = part.indices(self.shape[1])
        stop = max(start, stop)
        group = math.gcd(start, stop, self.grouping.group)
        if step != 1 or group % 2:
            raise ValueError(
                f"columns {start} to {stop} can't be cut from groups of {self.grouping.group}: expected even numbers"
            )
        form = self if group == self.grouping.group else self._in_smaller_groups(group)
        groups = slice(start // group, stop // group)
        if form.unit is None:
            return Grouped(form.grouping, form.values[groups], form.scale[:, groups])
        n = math.gcd(groups.start, groups.stop, form.grouping.unit)  # groups that share a unit
        unit = np.repeat(form.unit, form.grouping.unit // n, axis=1)[:, groups.start // n : groups.stop // n]
        return Grouped(replace(form.grouping, unit=n), form.values[groups], form.scale[:, groups], unit)

    def _in_smaller_groups(self, group: int) -> Grouped:
        """Return the same numbers in groups of a size that divides the present one."""
        n, n_out = self.grouping.group // group, self.shape[0]
        values = self.values.reshape(-1, group, n_out) if self.grouping.bits == 8 else self.values
        if self.grouping.bits == 4:
            q = np.concatenate([values & np.uint8(15), values >> np.uint8(4)], axis=1).reshape(-1, 2, group // 2, n_out)
            values = q[:, 0] | q[:, 1] << np.uint8(4)
        grouping = replace(self.grouping, group=group, unit=self.grouping.unit * n)
        return Grouped(grouping, values, np.repeat(self.scale, n, axis=1), self.unit)

    def widen(self, out: np.ndarray | None = None) -> np.ndarray:
        """Return scale · (q − zero) + offset in float32, each step rounded to nearest."""
        n_out, n_in = self.shape
        out = np.empty(self.shape, np.float32) if out is None else out
        groups = out.reshape(n_out, n_in // self.grouping.group, self.grouping.group).transpose(1, 2, 0)
        self.fill(groups, self.all_levels())
        return out

    def units(self) -> np.ndarray | None:
        """Return the units in float32, if there are any."""
        return None if self.unit is None else to_float32(self.unit)

    def levels(self, groups: slice, units: np.ndarray | None) -> np.ndarray:
        """Return scales and offsets of some groups in float32, given units().    -> [1 or 2, g, out]"""
        levels = to_float32(self.scale[:, groups])
        if units is not None:
            levels *= units[:, np.arange(groups.start, groups.start + levels.shape[1]) // self.grouping.unit]
        return levels

    def all_levels(self) -> np.ndarray:
        """Return the scales and offsets of all groups."""
        return self.levels(slice(0, self.scale.shape[1]), self.units())

    def fill(self, out: np.ndarray, levels: np.ndarray) -> None:
        """Write the numbers, given all_levels().    out float32 [g, group, out]"""
        self.integers(out)
        if self.grouping.zero:
            out -= np.float32(self.grouping.zero)
        out *= levels[0][:, None]
        if self.grouping.offset:
            out += levels[1][:, None]

    def integers(self, out: np.ndarray, groups: slice = slice(None), upper: int = 16) -> None:
        """Write q of some groups as it is stored, zero not subtracted.    out float32 [g, group, out]

        upper   what the second half of a group is divided by, of 4 bits in the upper half of a byte: 16, or 1 to leave it there
        """
        values = self.values[groups]
        if self.grouping.bits == 8:
            np.copyto(out, values)
            return
        half = self.grouping.group // 2
        np.copyto(out[:, :half], np.bitwise_and(values, np.uint8(15)))
        high = np.right_shift(values, np.uint8(4)) if upper == 16 else np.bitwise_and(values, np.uint8(0xF0))
        np.copyto(out[:, half:], high)

    def multiply(self, x: np.ndarray, buffer: np.ndarray, out: np.ndarray) -> None:
        """Write the products with a few rows of x, without multiplying every number of the weight by its scale.

        sum over g of  scale[g] · (x_g @ q_g)  +  (offset[g] − zero · scale[g]) · sum of x_g

        x [g, N, group], out [N, out]; float32 buffer, overwritten, takes at least one group
        """
        units, sums, N = self.units(), x.sum(axis=-1), x.shape[1]
        (n_out, _), group = self.shape, self.grouping.group
        at_once = max(1, len(buffer) // (group * n_out))  # groups of q
        # Scales and partial sums are computed with in larger parts, which still stay in a cache.
        step = at_once * max(1, min(16, 2 * len(buffer) // (N * n_out)) // at_once)
        width = max(1, IN_PLACE // (N * group * at_once))
        if self.grouping.bits == 4:  # the upper four bits stay in place, 16 times as large: this saves a step
            x = x.copy()
            x[..., group // 2 :] *= np.float32(1 / 16)
        out[:] = 0
        for start in range(0, len(x), step):
            part = slice(start, min(start + step, len(x)))
            partial = np.empty((part.stop - start, N, n_out), np.float32)
            for first in range(start, part.stop, at_once):
                some = slice(first, min(first + at_once, part.stop))
                numbers = buffer[: (some.stop - first) * group * n_out].reshape(-1, group, n_out)
                self.integers(numbers, some, upper=1)
                for column in range(0, n_out, width):
                    columns = slice(column, column + width)
                    np.matmul(x[some], numbers[..., columns], out=partial[first - start : some.stop - start, :, columns])
            levels = self.levels(part, units)
            partial *= levels[0][:, None]
            out += np.add.reduce(partial, axis=0)
            if self.grouping.zero:
                out -= np.float32(self.grouping.zero) * (sums[part].T @ levels[0])
            if self.grouping.offset:
                out += sums[part].T @ levels[1]


def to_float32(x: np.ndarray) -> np.ndarray:
    """Widen scales of any dtype in SCALES, exactly.

    The bits of a float16 are moved to their places in a float32 (see weights.Float16), three times as fast as NumPy's own cast.
    NumPy casts infinite numbers and NaN, for which this would be wrong.
    """
    x = native(x)
    if x.dtype == np.uint16:
        bits = x.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    if x.dtype != np.float16 or (x.view(np.uint16) & HALF_MAGNITUDE).max(initial=0) > LARGEST_HALF:
        return x.astype(np.float32)
    words = x.view(np.int16).astype(np.int32)
    words <<= np.int32(13)
    words &= HALF_BITS
    wide = words.view(np.float32)
    wide *= HALF_SCALE
    return wide


def to_int4(x: np.ndarray) -> Grouped:
    """Quantise rows in groups of 32 to the 16 multiples of a scale that reach from the least to the largest number of each.

    scale and offset are rounded to float16 first, and each number then goes to the nearest of the 16, in float64.
    float [out, in] -> Grouped with the grouping INT4
    """
    n_out, n_in = x.shape
    groups = np.asarray(x, np.float64).reshape(n_out, n_in // INT4.group, INT4.group)
    least, largest = groups.min(axis=-1), groups.max(axis=-1)
    scale, offset = ((largest - least) / 15).astype(np.float16), least.astype(np.float16)
    divisor = np.where(scale > 0, scale, 1).astype(np.float64)[..., None]
    q = np.clip(np.rint((groups - offset[..., None]) / divisor), 0, 15).astype(np.uint8)
    return Grouped.of(INT4, q.reshape(n_out, n_in), np.stack([scale, offset]))
