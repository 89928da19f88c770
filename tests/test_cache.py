"""Rows join, grow, are truncated and leave: each has the same logits as alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama import KVCache, Model, forward, generate
from npllama.generation import prefill

from tiny import CONFIGS, random_params, random_tokens, relative_error

CONFIG = CONFIGS["grouped"]
PARAMS = random_params(CONFIG, seed=1)
MODEL = Model(CONFIG, PARAMS)
N_ROWS = 4

# What happens to the rows: a number chooses what, rows and counts.
events = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 15), st.integers(1, 6)), min_size=4, max_size=14)


def last_logits(tokens: list[int]) -> np.ndarray:
    """Return the logits after some tokens, without a cache."""
    return forward(PARAMS, CONFIG, tokens, last_only=True)[-1]


def pointers(cache: KVCache) -> list[int]:
    """Return where the keys and values of each layer lie in memory."""
    G, K = CONFIG.n_kv_heads, CONFIG.head_dim
    nothing = np.zeros((*cache.batch_shape, 0, G, K), np.float32)
    return [x.ctypes.data for layer in range(CONFIG.n_layers) for x in cache.update(layer, nothing, nothing)]


@settings(max_examples=25, deadline=None)
@given(events=events, capacity=st.sampled_from([0, 64]), seed=st.integers(0, 99))
def test_rows_in_any_order_of_joins_and_leaves_are_as_alone(events, capacity, seed):
    rng = np.random.default_rng(seed)
    cache = KVCache(CONFIG, (N_ROWS,), capacity)
    held: list[list[int]] = [[] for _ in range(N_ROWS)]
    for what, subset, n in events:
        active = np.array([subset >> i & 1 for i in range(N_ROWS)], bool)
        first = int(np.argmax(active))
        tokens = rng.integers(0, CONFIG.vocab_size, (N_ROWS, n))
        if what <= 1:  # each of a subset goes on, by as many tokens
            logits = forward(PARAMS, CONFIG, np.where(active[:, None], tokens, -1), cache.only(active))
            rows = np.nonzero(active)[0]
        elif what == 2:  # by different numbers of tokens, padded on the left
            counts = np.where(active, rng.integers(1, n + 1, N_ROWS), 0)
            tokens = np.where(np.arange(n) >= n - counts[:, None], tokens, -1)
            logits, rows = forward(PARAMS, CONFIG, tokens, cache.only(active)), np.nonzero(active)[0]
        elif what == 3:  # a neighbourhood
            rows = np.arange(first, N_ROWS)
            tokens = np.where(np.isin(np.arange(N_ROWS), rows)[:, None], tokens, -1)
            logits = forward(PARAMS, CONFIG, tokens[first:], cache[first:])
            logits = np.concatenate([np.zeros((first, *logits.shape[1:])), logits])
        elif what == 4:  # one alone
            rows = np.array([first])
            logits = np.zeros((N_ROWS, n, CONFIG.vocab_size))
            logits[first] = forward(PARAMS, CONFIG, tokens[first], cache[first])
        else:  # one is cut back, or leaves
            cache[first].truncate(cache.lengths[first] // 2 if seed % 2 else 0)
            held[first] = held[first][: cache.n_tokens[first]]
            continue
        for row in rows:
            held[row] += tokens[row][tokens[row] >= 0].tolist()
            assert relative_error(logits[row, -1], last_logits(held[row])) < 3e-6
    assert cache.n_tokens.tolist() == list(map(len, held))


def test_a_reused_row_has_nothing_of_the_one_before():
    """Clear even NaN: NaN times a weight of 0 is NaN."""

    def run(cache: KVCache) -> list[np.ndarray]:
        joined = forward(PARAMS, CONFIG, random_tokens(CONFIG, 2, 5), cache[1])
        others = forward(PARAMS, CONFIG, random_tokens(CONFIG, 3, (3, 40))[::2], cache[::2])
        return [joined, others, forward(PARAMS, CONFIG, random_tokens(CONFIG, 4, (3, 1)), cache)]

    def poison(name, x):
        return np.full_like(x, np.nan) if name.endswith(("k_rope", "attention.v")) else x

    def interrupt(name, x):
        if name == "layers.1.attention.heads":
            raise KeyboardInterrupt
        return poison(name, x)

    fresh, reused = KVCache(CONFIG, (3,)), KVCache(CONFIG, (3,))
    forward(PARAMS, CONFIG, random_tokens(CONFIG, 5, 60), reused[1], tap=poison)
    reused[1].truncate(0)
    with pytest.raises(KeyboardInterrupt):
        forward(PARAMS, CONFIG, random_tokens(CONFIG, 6, 20), reused[1], tap=interrupt)
    assert reused.lengths.tolist() == reused.n_tokens.tolist() == [0, 0, 0]
    for found, expected in zip(run(reused), run(fresh), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found, expected)


def test_what_an_interrupted_pass_left_is_never_attended_to():
    """Leave a third slot whose position is that of the token that comes instead, in the first."""
    cache = KVCache(CONFIG, (2,))
    first = random_tokens(CONFIG, 2, (2, 4))
    forward(PARAMS, CONFIG, first, cache)
    forward(PARAMS, CONFIG, random_tokens(CONFIG, 3, 9), cache[0])

    def interrupt(name, x):
        if name == "layers.1.out":
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        forward(PARAMS, CONFIG, [-1, -1, 5, 6], cache[1], tap=interrupt)
    logits = forward(PARAMS, CONFIG, [[7], [8]], cache)
    assert relative_error(logits[1, 0], last_logits([*first[1], 8])) < 3e-6


def test_long_chunks_of_rows_of_different_lengths_in_one_pass():
    """Run tiled attention, several tiles a row, and a batch of two axes."""
    cache = KVCache(CONFIG, (2, 2))
    lengths = np.array([[3, 0], [90, 41]])
    befores = [random_tokens(CONFIG, i, n) for i, n in enumerate(lengths.flat)]
    for at, before in zip(np.ndindex(2, 2), befores, strict=True):
        if len(before):
            forward(PARAMS, CONFIG, before, cache[at[0]][at[1]])
    np.testing.assert_array_equal(cache.lengths, lengths)
    tokens = random_tokens(CONFIG, 9, (2, 2, 200))
    logits = forward(PARAMS, CONFIG, tokens, cache)
    for at, before in zip(np.ndindex(2, 2), befores, strict=True):
        alone = forward(PARAMS, CONFIG, np.concatenate([before, tokens[at]]).astype(int))
        assert relative_error(logits[at], alone[len(before) :]) < 3e-6


@pytest.mark.parametrize("lookup", [0, 5])
def test_generate_takes_a_row_as_its_cache(lookup):
    cache = KVCache(CONFIG, (3,), capacity=100)
    prompts = [[1, 2, 3, 4] * 3, [5, 6], random_tokens(CONFIG, 7, 20).tolist()]
    streams = [generate(MODEL, p, 30, cache=cache[i], lookup=lookup) for i, p in enumerate(prompts)]
    found = [list(ids) for ids in zip(*streams, strict=True)]  # alternately, a token each
    for prompt, ids in zip(prompts, zip(*found, strict=True), strict=True):
        assert list(ids) == list(generate(MODEL, prompt, 30))


def test_with_capacity_no_row_is_copied_or_moved():
    cache = KVCache(CONFIG, (3,), capacity=300)
    prefill(MODEL, random_tokens(CONFIG, 1, 7), cache[1])
    before = pointers(cache)
    prefill(MODEL, random_tokens(CONFIG, 2, 250), cache[0])
    cache[1].truncate(3)
    forward(PARAMS, CONFIG, [[1], [2], [-1]], cache.only([True, True, False]))
    cache[0].truncate(0)
    prefill(MODEL, random_tokens(CONFIG, 2, 50), cache[2])
    assert pointers(cache) == before
    assert pointers(cache[1:])[0] == pointers(cache[1])[0]
    assert cache.lengths.tolist() == [0, 4, 50]


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_pass_of_no_tokens_changes_nothing(batch):
    """Call the cache directly, as exercises do; forward() takes no such pass."""
    tokens, cache = random_tokens(CONFIG, seed=3, shape=(*batch, 5)), KVCache(CONFIG, batch)
    for _ in range(2):
        length = cache.length
        assert cache.extend(np.zeros((*batch, 0), bool)).shape == (*batch, 0)
        assert cache.update(0, *np.zeros((2, *batch, 0, CONFIG.n_kv_heads, CONFIG.head_dim), np.float32))[0].shape[-2] == length
        cache.commit()
        assert cache.length == length
        forward(PARAMS, CONFIG, tokens[..., :3], cache)
    cache.truncate(3)
    found = forward(PARAMS, CONFIG, tokens[..., 3:], cache)
    assert relative_error(found, forward(PARAMS, CONFIG, tokens)[..., 3:, :]) < 3e-6


@pytest.mark.parametrize("batch", [(), (2,)])
def test_counts_and_positions_are_whole_numbers(batch):
    cache = KVCache(CONFIG, batch)
    for _ in range(2):
        positions = cache.extend(np.ones((*batch, 3), bool))
        assert {x.dtype for x in (positions, cache.positions, cache.lengths, cache.n_tokens)} == {np.dtype(np.int64)}
        cache.commit()
    assert cache.n_tokens.tolist() == np.full(batch, 6).tolist()
    cache.truncate(0)
    assert cache.positions.shape == (*batch, 0)


def test_bad_rows_are_refused_in_one_line():
    cache = KVCache(CONFIG, (3,))
    with pytest.raises(TypeError, match="found an index of type list, expected a row's number or a slice"):
        cache[[0, 2]]
    with pytest.raises(TypeError, match="found an index of a cache of one sequence"):
        cache[0][0]
    with pytest.raises(IndexError):
        cache[3]
    with pytest.raises(ValueError, match=r"active rows have shape \(2,\), but the cache was made for \(3,\)"):
        cache.only([True, False])
    with pytest.raises(ValueError, match="no row is active"):
        cache.only([False] * 3)
    with pytest.raises(ValueError, match="found a token in a row that is not active"):
        forward(PARAMS, CONFIG, [[1], [2], [-1]], cache.only([True, False, False]))
    with pytest.raises(ValueError, match="513 tokens do not fit the model's context of 512"):
        forward(PARAMS, CONFIG, [3] * 513, cache[2])
    assert cache.length == 0


def test_a_pass_takes_slots_of_the_rows_that_it_is_for():
    cache = KVCache(CONFIG, (3,))
    forward(PARAMS, CONFIG, [[1, 2, 3]] * 3, cache)
    forward(PARAMS, CONFIG, [[4], [-1], [-1]], cache.only([True, False, False]))  # rows of one length
    assert cache.lengths.tolist() == [4, 3, 3]
    forward(PARAMS, CONFIG, [[5], [5], [5]], cache)  # rows of different lengths
    assert cache.lengths.tolist() == [5, 4, 4]
