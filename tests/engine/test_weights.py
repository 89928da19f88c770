"""Check every form of weight: parts, rows by number, numbers, tiles."""

from __future__ import annotations

import gc
import os
import weakref

import numpy as np
import pytest

from npllama.engine import linear, weights
from npllama.engine.weights import Bfloat16, Dense, Float16, Int8, Packed, SideBySide, block_of, form_of, widen

from tiny import relative_error, uniform

FORMS = {
    "float32": (Dense, lambda x: x),
    "float64": (Dense, lambda x: x.astype(np.float64)),
    "bfloat16": (Bfloat16, weights.to_bfloat16),
    "float16": (Float16, lambda x: x.astype(np.float16)),
    "int8": (Int8, weights.to_int8),
}


@pytest.fixture(params=FORMS)
def stored(request):
    """Return a weight as given, the class of its form, and its numbers."""
    kind, pack = FORMS[request.param]
    weight = pack(uniform(1, (13, 10)))
    return weight, kind, np.array(widen(weight))


def test_an_array_has_the_form_that_its_dtype_says(stored):
    weight, kind, _ = stored
    form = form_of(weight)
    assert type(form) is kind
    assert form_of(form) is form
    assert weights.is_packed(weight) == weights.is_packed(form) == issubclass(kind, Packed)
    for name in ("shape", "dtype", "ndim", "size"):
        assert getattr(form, name) == getattr(weight, name)
    assert form.nbytes == weight.nbytes == (130 + 13 * 4 if kind is Int8 else 130 * form.dtype.itemsize)


@pytest.mark.parametrize("part", [slice(0, 13), slice(3, 7), slice(12, 13), slice(4, 4), np.array([5, 0, 5, 12])], ids=str)
def test_rows_are_those_of_the_numbers_in_the_same_form(stored, part):
    weight, kind, numbers = stored
    rows = form_of(weight).rows(part)
    assert type(rows) is kind
    np.testing.assert_array_equal(rows.widen(), numbers[part])
    assert rows.widen().dtype == numbers.dtype


@pytest.mark.parametrize("part", [slice(0, 10), slice(2, 8), slice(3, 4)], ids=str)
def test_columns_are_those_of_the_numbers_in_the_same_form(stored, part):
    weight, kind, numbers = stored
    columns = form_of(weight).columns(part)
    assert type(columns) is kind
    np.testing.assert_array_equal(columns.widen(), numbers[:, part])
    x = uniform(2, (3, part.stop - part.start)).astype(numbers.dtype)
    exact = x.astype(np.float64) @ numbers[:, part].astype(np.float64).T
    assert relative_error(linear.linear(x, columns), exact) < 1e-6
    np.testing.assert_array_equal(columns.rows(slice(2, 5)).widen(), numbers[2:5, part])


def test_numbers_go_where_they_are_wanted(stored):
    weight, _, numbers = stored
    out = np.full(numbers.shape, np.nan, numbers.dtype)
    assert form_of(weight).widen(out) is out
    np.testing.assert_array_equal(out, numbers)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("n_in", [1, 7, 10])
@pytest.mark.parametrize("large", [False, True])
def test_tiles_and_sides_make_the_product(name, n_in, large):
    """Multiply in tiles however a form splits its columns, also x too large for float16's pairs."""
    form = form_of(FORMS[name][1](uniform(3, (9, n_in))))
    x = uniform(4, (5, n_in)) * np.float32(1e6 if large else 1)
    sides = form.sides(x)
    expected = 2 if n_in == 10 and name != "int8" and not (large and name == "float16") else 1
    assert sides.shape == (expected, 5, n_in // expected)
    exact = x.astype(np.float64) @ form.widen().astype(np.float64).T
    for part in (slice(0, 9), slice(2, 5)):
        words = np.full((part.stop - part.start) * n_in, 0xFFFFFFFF, np.uint32)
        tile = form.tile(part, len(sides), words)
        y = np.sum(sides.astype(np.float64) @ tile.astype(np.float64).swapaxes(-1, -2), axis=0)
        assert relative_error(form.rows(part).finish(y), exact[:, part]) < 1e-6


def test_bfloat16_is_the_nearest_and_of_two_the_even_one():
    """Round ties, and one bit below and above them, next to even and odd numbers; beyond the largest is infinity."""
    nearest = {
        0x3F807FFF: 0x3F80,
        0x3F808000: 0x3F80,
        0x3F808001: 0x3F81,
        0x3F817FFF: 0x3F81,
        0x3F818000: 0x3F82,
        0x3F818001: 0x3F82,
        0xBF808000: 0xBF80,
        0xBF818000: 0xBF82,
        0x00008000: 0x0000,
        0x00018000: 0x0002,
        0x7F7F7FFF: 0x7F7F,
        0x7F7F8000: 0x7F80,
    }
    x = np.array(list(nearest), np.uint32).view(np.float32)
    assert weights.to_bfloat16(x).tolist() == list(nearest.values())


def test_every_kind_of_nan_stays_one_in_bfloat16():
    """Keep the sign and the upper bits of the payload, also where those are zero; some would round to infinity."""
    bits = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0x7F810000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    expected = [0x7FC0, 0xFFC0, 0x7FC0, 0x7FC1, 0x7FFF, 0xFFFF]
    assert weights.to_bfloat16(bits.view(np.float32)).tolist() == expected


def test_tokens_take_rows_of_any_form(stored):
    weight, _, numbers = stored
    tokens = np.array([[1, -1, 12], [0, 3, 3]])
    found = linear.embed(tokens, weight)
    np.testing.assert_array_equal(found, numbers[np.maximum(tokens, 0)])
    assert found.flags.c_contiguous


def test_matrices_side_by_side_are_one_block():
    block = uniform(5, (4, 9)).T
    a, b, c = parts = SideBySide.of(block, [2, 3, 4])
    np.testing.assert_array_equal(np.concatenate(parts), block)
    assert all(np.shares_memory(part, block) for part in parts)
    assert block_of(parts) is block
    other = SideBySide.of(block.copy(), [2, 3, 4])
    for others in ([a], [a, b], [b, c], [b, a, c], [a, a, c], [a, other[1], c], [np.asarray(a), b, c], [a, np.asarray(b), c]):
        assert block_of(others) is None
    for derived in (a[:1], a.copy(), a + 1, a.T):
        assert derived.whole is None  # what is computed or cut from a part lies elsewhere
    assert type(linear.linear(uniform(6, (1, 4)), a)) is np.ndarray


def test_nothing_holds_a_block_when_its_matrices_are_gone():
    """Free weights without the garbage collector: a reference cycle would keep gigabytes."""
    parts = SideBySide.of(np.ones((4, 6), np.float32).T, [2, 4])
    block = weakref.ref(parts[0].whole)
    gc.disable()
    try:
        del parts
        assert block() is None
    finally:
        gc.enable()


@pytest.fixture
def level2(monkeypatch):
    """Return a function that sets the second-level cache size that the system reports, or its error."""

    def says(answer):
        def sysconf(name):
            assert name == "SC_LEVEL2_CACHE_SIZE"
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(os, "sysconf", sysconf, raising=False)
        linear.tile_size.cache_clear()

    yield says
    linear.tile_size.cache_clear()


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [(2 << 20, 1 << 18), (512 << 10, 1 << 16), (0, 1 << 17), (-1, 1 << 17), (ValueError(), 1 << 17), (OSError(), 1 << 17)],
)
def test_one_thread_s_tiles_take_half_of_the_second_level_cache(level2, answer, numbers):
    level2(answer)
    assert linear.tile_size(1) == numbers
    assert type(linear.tile_size(1)) is int
    assert linear.tile_size(2) == linear.tile_size(5) == linear.TILE
