"""Compute y = x Wᵀ by every path: numbers of rows, storages, tiles, numbers of threads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from npllama import ops
from npllama.engine import fast, linear, threads
from npllama.engine.weights import Shard, form_of
from npllama.scope import Scope

from tiny import byte_swapped, relative_error, uniform

PACK = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "bfloat16": linear.to_bfloat16,
    "float16": lambda x: x.astype(np.float16),
    "int8": linear.to_int8,
}


@pytest.fixture(autouse=True, params=[1, 2, 3], ids=lambda n: f"{n}threads")
def n_threads(request, monkeypatch, threads_restored):
    """Run each test on one thread and on more; all work, however small, is shared."""
    threads.set_threads(request.param)
    monkeypatch.setattr(linear, "SHARED", 1)
    monkeypatch.setattr(fast, "SHARED", 1)
    return request.param


def exact(x, weight):
    return x.astype(np.float64) @ linear.widen(weight).astype(np.float64).T


@pytest.mark.parametrize("storage", PACK)
@pytest.mark.parametrize("shape", [(53, 96), (200, 64), (1, 7), (130, 33)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 40])
def test_every_path_is_the_product(storage, shape, rows, monkeypatch):
    monkeypatch.setattr(linear, "tile_size", lambda n: 20 * shape[1])  # 20 rows a tile: the last one is a part
    x = uniform(rows, (rows, shape[1]))
    weight = PACK[storage](uniform(5, shape))
    y = linear.linear(x if storage != "float64" else x.astype(np.float64), weight)
    assert y.dtype == (np.float64 if storage == "float64" else np.float32)
    assert y.shape == (rows, shape[0])
    assert relative_error(y, exact(x, weight)) < (1e-15 if storage == "float64" else 1e-6)


@pytest.mark.parametrize("storage", PACK)
def test_a_row_is_the_same_in_any_batch(storage):
    """Compare within rounding: a token's result doesn't depend on the other tokens of the batch."""
    x, weight = uniform(1, (24, 96)), PACK[storage](uniform(2, (300, 96)))
    together = linear.linear(x.astype(linear.widen(weight).dtype), weight)
    for rows in (1, 2, 5, 16):
        alone = linear.linear(x[:rows].astype(together.dtype), weight)
        assert relative_error(alone, together[:rows]) < 1e-6


@pytest.mark.parametrize("rows", [1, 3, 30])
def test_every_float16_is_widened_exactly(rows):
    """Multiply each of the 63,488 finite ones, subnormal and zero too, by one and zeros."""
    bits = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    weight = np.where(np.isfinite(bits), bits, np.float16(0)).reshape(-1, 64)
    for column in (0, 1, 62, 63):
        x = np.zeros((rows, 64), np.float32)
        x[:, column] = 1
        y = linear.linear(x, weight)
        np.testing.assert_array_equal(y, np.broadcast_to(weight[:, column].astype(np.float32), y.shape))


@pytest.mark.parametrize("large", [3e4, 7e4, 1e6, 1e30, np.inf, np.nan])
def test_float16_weights_take_any_input(large):
    """Multiply rows beyond 2^15, where the scaled form would overflow: they take the other path."""
    x, weight = uniform(3, (2, 64)), uniform(4, (50, 64)).astype(np.float16)
    x[1, 5] = large
    y = linear.linear(x, weight)
    with np.errstate(invalid="ignore"):
        expected = exact(x, weight)
    assert relative_error(y[0], expected[0]) < 1e-6
    np.testing.assert_array_equal(np.isfinite(y[1]), np.isfinite(expected[1]))
    if np.isfinite(large):
        assert relative_error(y[1], expected[1]) < 1e-6


@pytest.mark.parametrize("storage", PACK)
@pytest.mark.parametrize("dtype", ["<f2", ">f2"])
@pytest.mark.parametrize("rows", [1, 30])
def test_float16_activations_are_widened(storage, dtype, rows):
    x, weight = uniform(5, (rows, 48)).astype(dtype), PACK[storage](uniform(6, (40, 48)))
    y = linear.linear(x, weight)
    np.testing.assert_array_equal(y, linear.linear(x.astype(np.float32), weight))
    assert y.dtype == linear.widen(weight).dtype


@pytest.mark.parametrize("storage", PACK)
def test_a_shard_joins_the_products_of_its_part(storage):
    x, weight = uniform(5, (3, 2, 48)), PACK[storage](uniform(6, (40, 48)))
    whole = linear.linear(x, weight)
    shard = Shard(form_of(weight).rows(slice(0, 10)), lambda y: np.concatenate([y, whole[..., 10:]], axis=-1))
    np.testing.assert_allclose(linear.linear(x, shard), whole, rtol=1e-6)


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_a_weight_is_read_wherever_it_lies(storage):
    packed = PACK[storage](uniform(6, (40, 48)))
    raw = np.zeros(packed.nbytes + 2, np.uint8)
    moved = raw[2:].view(packed.dtype).reshape(packed.shape)
    moved[:] = packed
    x = uniform(7, (1, 48))
    for weight in (moved, moved[:, 3:41], moved[::2], np.asfortranarray(moved)):
        assert relative_error(linear.linear(x[:, : weight.shape[1]], weight), exact(x[:, : weight.shape[1]], weight)) < 1e-6


@pytest.mark.parametrize("storage", PACK)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_foreign_byte_order_gives_the_same_bits(storage, rows):
    """Take arrays in the other byte order, as files of another machine are: `>u2` is not np.uint16 to NumPy."""
    x, weight = uniform(8, (rows, 48)), PACK[storage](uniform(9, (70, 48)))
    x = x.astype(linear.widen(weight).dtype)
    if storage == "int8":
        other = linear.Int8(weight.values, byte_swapped(weight.scale))
    else:
        other = byte_swapped(weight)
        assert not other.dtype.isnative
        tokens = np.array([[3, 60], [-1, 7]])
        for embedded in (linear.embed(tokens, other), linear.embed(byte_swapped(tokens), other)):
            np.testing.assert_array_equal(embedded, linear.embed(tokens, weight))
            assert embedded.dtype.isnative
    assert linear.is_packed(other) == linear.is_packed(weight) == (storage not in ("float32", "float64"))
    expected = linear.linear(x, weight)
    for y in (linear.linear(x, other), linear.linears(x, other, other)[1]):
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)
    # NumPy itself multiplies what has a foreign byte order, in an order of summation of its own.
    assert relative_error(linear.linear(byte_swapped(x), other), expected) < 1e-6
    assert relative_error(linear.products(byte_swapped(x), byte_swapped(x)), linear.products(x, x)) < 1e-6
    np.testing.assert_array_equal(linear.widen(other), linear.widen(weight))
    assert linear.widen(other).dtype.isnative


@pytest.mark.parametrize("pack", [linear.to_bfloat16, linear.to_int8])
def test_packing_takes_any_byte_order(pack):
    x = uniform(3, (5, 16))
    np.testing.assert_array_equal(linear.widen(pack(byte_swapped(x))), linear.widen(pack(x)))


def test_an_array_in_native_byte_order_is_not_copied():
    x, packed = uniform(1, (4, 4)), linear.to_int8(uniform(1, (4, 4)))
    assert linear.native(x) is x
    assert linear.native(packed) is packed


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_pairs_on_a_machine_of_the_other_byte_order(storage, rows, monkeypatch):
    """Simulate big-endian words, whose halves are swapped, by swapping neighbours."""
    x, weight = uniform(8, (rows, 48)), PACK[storage](uniform(9, (70, 48)))
    expected = linear.linear(x, weight)
    swapped = np.ascontiguousarray(weight.reshape(70, 24, 2)[:, :, ::-1]).reshape(70, 48)
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    np.testing.assert_array_equal(linear.linear(x, swapped), expected)


@pytest.mark.parametrize("n", [1, 3, 16, 17])
@pytest.mark.parametrize("slots", [1, 31, 20_000])
def test_products_are_the_dot_products(n, slots):
    x, y = uniform(8, (2, n, 64)), uniform(9, (2, slots, 64))
    found = linear.products(x, y)
    assert found.dtype == np.float32
    assert relative_error(found, np.einsum("gnk,gsk->gns", x.astype(np.float64), y.astype(np.float64))) < 1e-6


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 70), (9, 9), (30, 71), (64, 64)])
@pytest.mark.parametrize("tile", [1, 100, 2500, 1 << 17])
def test_tiled_attention_is_attention(batch, T, S, tile, monkeypatch):
    """Attend in tiles of one key head, of two and then the third (2,500 scores of 64 slots), and of all three."""
    monkeypatch.setattr(fast, "TILE", tile)
    monkeypatch.setattr(fast, "QUERIES", 8)
    monkeypatch.setattr(fast, "SHARED", 0)
    H, G, K = 6, 3, 8
    q, keys, values = uniform(1, (*batch, T, H, K)), uniform(2, (*batch, G, S, K)), uniform(3, (*batch, G, S, K))
    slots = np.broadcast_to(np.arange(S), (*batch, S)).copy()
    if batch:
        slots[1] -= 5  # a row whose first five slots are padding
        slots[1, : min(5, S - T)] = 1 << 30
    mask = ops.causal_mask(slots[..., S - T :], slots, np.float32)
    expected = ops.attention_heads(ops.softmax(ops.attention_scores(q, keys, mask)), values)
    found = fast.tiled_attention(q, keys, values, mask)
    assert found.dtype == np.float32
    assert relative_error(found, expected) < 1e-6


@pytest.mark.torch
@pytest.mark.parametrize("padding", [5, 20, 33])
def test_padding_beyond_the_first_tile_is_hidden_as_in_torch(padding, monkeypatch):
    """Pad a row on the left, in one chunk without a cache: only tiles after the first have slots before their queries."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setattr(fast, "TILE", 1)  # 8 queries a tile, the fewest
    B, T, H, G, K = 2, 40, 6, 2, 8
    q, keys, values = uniform(1, (B, T, H, K)), uniform(2, (B, G, T, K)), uniform(3, (B, G, T, K))
    positions = np.broadcast_to(np.arange(T), (B, T)).copy()
    positions[1] -= padding
    positions[1, :padding] = 1 << 30
    visible = torch.from_numpy(positions[:, None, None, :] <= positions[:, None, :, None])
    tensors = (torch.from_numpy(x.astype(np.float64)) for x in (q.swapaxes(1, 2), keys, values))
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(*tensors, attn_mask=visible, enable_gqa=True).numpy().swapaxes(1, 2)
    found = fast.tiled_attention(q, keys, values, ops.causal_mask(positions, positions, np.float32))
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1, padding:], expected[1, padding:]) < 1e-6


def test_tiled_attention_of_large_scores(monkeypatch):
    """Subtract the largest score first, as exp(1000) overflows float32."""
    monkeypatch.setattr(fast, "SHARED", 0)
    q, keys, values = np.full((9, 2, 4), 500, np.float32), np.ones((2, 9, 4), np.float32), uniform(3, (2, 9, 4))
    found = fast.tiled_attention(q, keys, values, ops.causal_mask(np.arange(9), np.arange(9), np.float32))
    means = np.cumsum(values, axis=1) / np.arange(1, 10)[:, None]  # equal scores: every slot so far weighs the same
    assert relative_error(found, means.swapaxes(0, 1)) < 1e-7


@pytest.mark.parametrize("shape", [(9, 5), (2, 9, 5), (8, 5), (3, 5), (1, 5)], ids=str)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_tokens_go_separate_ways(shape, n_threads, monkeypatch):
    """Compute every token once, on as many threads as have enough of them; the function itself is unchanged."""
    monkeypatch.setattr(fast, "TOKENS", 4)
    x, sizes, before = uniform(10, shape), [], threads.n_threads()
    n = x.size // 5

    def f(x: np.ndarray, s: Scope) -> np.ndarray:
        sizes.append(x.size // 5)
        return x * 2 + np.max(x, axis=-1, keepdims=True)

    threads.set_threads(n_threads)
    try:
        found = fast.by_token(f)(x, Scope({}, None, None, None))
    finally:
        threads.set_threads(before)
    np.testing.assert_array_equal(found, x * 2 + np.max(x, axis=-1, keepdims=True))
    share = -(-n // n_threads)
    assert sorted(sizes) == ([n] if share < 4 else sorted(min(share, n - i) for i in range(0, n, share)))


def test_with_a_tap_tokens_stay_together(n_threads, monkeypatch):
    """Show a tap whole activations: with a tap, FAST computes as PLAIN does."""
    monkeypatch.setattr(fast, "TOKENS", 1)
    x, sizes = uniform(10, (12, 5)), []
    fast.by_token(lambda x, s: sizes.append(len(x)) or x)(x, Scope({}, None, None, None, tap=lambda name, x: x))
    assert sizes == [12]


def test_no_input_is_changed():
    q, keys, values = uniform(1, (40, 4, 8)), uniform(2, (2, 40, 8)), uniform(3, (2, 40, 8))
    mask = ops.causal_mask(np.arange(40), np.arange(40), np.float32)
    x, weight = uniform(4, (5, 32)), uniform(5, 32)
    cos, sin = ops.rope_rotation(np.arange(40), ops.rope_frequencies(8, 1e4, None, np.float32))
    before = [a.copy() for a in (q, keys, values, mask, x, weight, cos, sin)]
    fast.tiled_attention(q, keys, values, mask)
    ops.attention_scores(q, keys, mask), ops.softmax(x), ops.rms_norm(x, weight, 1e-5), ops.swiglu(x, x), ops.silu(x)
    ops.rope(q, cos, sin), linear.linear(x, x), linear.products(x, x)
    for a, b in zip(before, (q, keys, values, mask, x, weight, cos, sin), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("rows", [2, 11, 16])
def test_columns_are_in_c_order_whatever_the_weight_s_order(rows, order, monkeypatch):
    """Keep the few columns in C order: with both matrices transposed, OpenBLAS 0.3.31's AVX-512 kernels corrupt memory."""
    layouts, few_columns = [], linear.few_columns

    def watch(weight, columns, out):
        layouts.append((columns.flags.c_contiguous, columns.shape))
        few_columns(weight, columns, out)

    monkeypatch.setattr(linear, "few_columns", watch)
    linear.linear(uniform(1, (rows, 96)), np.asarray(uniform(2, (200, 96)), order=order))
    assert set(layouts) == {(True, (96, rows))}


@pytest.mark.parametrize(
    ("n_in", "rows", "tile"),
    [(96, 2, 64), (1000, 15, 64), (1000, 16, 32), (10_000, 4, 16), (10_000, 16, 4), (125_000, 8, 1), (200_000, 9, 1)],
)
def test_a_few_rows_are_multiplied_in_tiles_that_are_read_in_place(n_in, rows, tile, monkeypatch):
    """Take the largest power of two of rows, up to 64, with no more than a million multiplications."""
    assert (linear.FEW_TILE, linear.IN_PLACE) == (64, 1_000_000)
    weight, columns, products, matmul = np.ones((70, n_in), np.float32), np.ones((n_in, rows), np.float32), [], np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, out: products.append(a.shape) or matmul(a, b, out=out))
    linear.few_columns(weight, columns, np.empty((70, rows), np.float32))
    assert products == [(70 // tile, tile, n_in)] + [(70 % tile, n_in)] * (70 % tile > 0)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [2, 16])
def test_each_row_of_the_weight_is_multiplied_once_and_in_float32(storage, rows, n_threads, monkeypatch):
    multiplied, few_columns = [], linear.few_columns

    def watch(weight, columns, out):
        multiplied.append(weight.shape[-2])
        assert out.dtype == np.float32
        few_columns(weight, columns, out)

    monkeypatch.setattr(linear, "tile_size", lambda n: 20 * 96)
    monkeypatch.setattr(linear, "few_columns", watch)
    linear.linear(uniform(1, (rows, 96)), PACK[storage](uniform(2, (200, 96))))
    assert sum(multiplied) == 200


@pytest.mark.parametrize("shared", [False, True])
def test_work_is_shared_from_a_size_on(shared, n_threads, monkeypatch):
    """Share a product of SHARED multiplications, and attention of SHARED scores; with one less neither is shared."""
    pieces = []
    for module in (linear, fast):
        monkeypatch.setattr(module, "parallel", lambda task, n: pieces.append(n) or [task(i) for i in range(n)])
        monkeypatch.setattr(module, "SHARED", (4 * 48 * 128 if module is linear else 16 * 2 * 16) + (not shared))
    weight, x = uniform(1, (128, 48)), uniform(2, (4, 48))
    linear.linear(x, weight)
    linear.linear(x, linear.to_bfloat16(weight))
    assert pieces == [min(n_threads, 2) if shared else 1, n_threads if shared else 1]  # 128 rows are two tiles of 64
    pieces.clear()
    fast.tiled_attention(
        uniform(1, (16, 2, 4)), uniform(2, (1, 16, 4)), uniform(3, (1, 16, 4)), np.zeros((1, 16, 16), np.float32)
    )
    assert bool(pieces) == shared


def test_a_tile_of_attention_has_eight_queries_at_least(monkeypatch):
    pieces = []
    monkeypatch.setattr(fast, "parallel", lambda task, n: pieces.append(n) or [task(i) for i in range(n)])
    monkeypatch.setattr(fast, "TILE", 1)
    q, keys = uniform(1, (72, 2, 4)), uniform(2, (1, 72, 4))
    fast.tiled_attention(q, keys, keys, ops.causal_mask(np.arange(72), np.arange(72), np.float32))
    assert pieces == [9]


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
def test_attention_of_a_prompt_has_tiles_for_every_thread(threads, monkeypatch):
    """Cut 512 queries of SmolLM2-135M's 9 heads so that each thread has four tiles at least."""
    pieces = []
    monkeypatch.setattr(fast, "parallel", lambda task, n: pieces.append(n))
    monkeypatch.setattr(fast, "n_threads", lambda: threads)
    q, keys, mask = (np.zeros(shape, np.float32) for shape in ((512, 9, 64), (3, 512, 64), (1, 512, 512)))
    fast.tiled_attention(q, keys, keys, mask)
    assert pieces[0] >= min(4 * threads, 3 * 64), "one key head and eight queries are the smallest tile"


SIDE_BY_SIDE = """
import sys, threading, time
import numpy as np
from npllama.engine.linear import linear
random = np.random.default_rng(0)
weight = np.asfortranarray(random.standard_normal((1024, 192)).astype(np.float32))
end, wrong = time.monotonic() + 2, []

def multiply(n):
    x = random.standard_normal((n, 192)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T
    while time.monotonic() < end and not wrong:
        if np.abs(linear(x, weight) - expected).max() > 1e-3:
            wrong.append(n)

for a, b in ((11, 10), (14, 13)):
    end = time.monotonic() + 2
    both = [threading.Thread(target=multiply, args=(n,)) for n in (a, b)]
    [thread.start() for thread in both], [thread.join() for thread in both]
sys.exit(1 if wrong else 0)
"""


def test_two_threads_multiply_few_rows_side_by_side():
    """Multiply in two threads at once, which crashed OpenBLAS 0.3.31 on AVX-512 with columns in the obvious order."""
    done = subprocess.run([sys.executable, "-c", SIDE_BY_SIDE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
