"""Properties of the forward pass that hold for any weights."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from npllama import Config, KVCache, forward
from npllama.engine.linear import to_bfloat16

import tiny
from tiny import CONFIGS, byte_swapped, random_params, random_tokens, relative_error

GROUPED = CONFIGS["grouped"]
PARAMS = random_params(GROUPED, seed=1)
TOKENS = random_tokens(GROUPED, seed=2, shape=24)


def held(cache: KVCache, config: Config, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all keys and values that a layer has so far: those after adding none."""
    G, K = config.n_kv_heads, config.head_dim
    return cache.update(layer, np.zeros((0, G, K), np.float32), np.zeros((0, G, K), np.float32))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [(1,) * 24, (23, 1), (5, 1, 11, 7), (12, 12)], ids=str)
def test_cached_in_any_chunks_equals_uncached(name, sizes):
    config = CONFIGS[name]
    params = random_params(config, seed=1)
    tokens = random_tokens(config, seed=2, shape=24)
    cache = KVCache(config)
    chunks = np.split(tokens, np.cumsum(sizes)[:-1])
    logits = np.concatenate([forward(params, config, chunk, cache) for chunk in chunks])
    assert relative_error(logits, forward(params, config, tokens)) < 3e-6


def test_a_token_changes_nothing_before_itself():
    changed = TOKENS.copy()
    changed[15] = (changed[15] + 1) % GROUPED.vocab_size
    before, after = forward(PARAMS, GROUPED, TOKENS), forward(PARAMS, GROUPED, changed)
    np.testing.assert_array_equal(after[:15], before[:15])
    assert (np.abs(after[15:] - before[15:]).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "bfloat16"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_ragged_batch_equals_that_row_alone(side, packed):
    params = PARAMS
    if packed:
        params = {k: (x.view(np.uint32) >> 16).astype(np.uint16) if x.ndim == 2 else x for k, x in PARAMS.items()}
    rows = [random_tokens(GROUPED, seed, length) for seed, length in enumerate((24, 1, 7, 16))]
    batch = np.full((4, 24), -1)
    for i, row in enumerate(rows):
        batch[i, slice(24 - len(row), None) if side == "left" else slice(len(row))] = row
    following = random_tokens(GROUPED, 9, (4, 3))

    cache = KVCache(GROUPED, (4,))
    prefill = forward(params, GROUPED, batch, cache)
    decode = forward(params, GROUPED, following, cache)
    for i, row in enumerate(rows):
        alone = forward(params, GROUPED, np.concatenate([row, following[i]]))
        assert relative_error(prefill[i][batch[i] >= 0], alone[: len(row)]) < 2e-6
        assert relative_error(decode[i], alone[len(row) :]) < 2e-6


def test_a_row_of_nothing_but_padding_stays_finite():
    logits = forward(PARAMS, GROUPED, np.array([[-1, -1], [3, 4]]))
    assert np.isfinite(logits).all()
    assert relative_error(logits[1], forward(PARAMS, GROUPED, [3, 4])) < 2e-6


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_activation_is_promoted_and_all_have_their_name_and_shape(name, dtype):
    config = CONFIGS[name]
    seen: dict[str, tuple] = {}

    def tap(name, x):
        assert name not in seen
        assert x.dtype == dtype, name
        seen[name] = x.shape
        return x

    cache = KVCache(config)
    params = random_params(config, seed=1, dtype=dtype)
    assert forward(params, config, TOKENS[:5], cache).dtype == dtype
    forward(params, config, TOKENS[5:12], cache, tap=tap)  # T = 7 new of S = 12
    T, S, D, F, V = 7, 12, config.dim, config.ffn_dim, config.vocab_size
    H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
    layer = {
        "attention_norm": (T, D),
        "attention.q": (T, H, K),
        "attention.k": (T, G, K),
        "attention.v": (T, G, K),
        "attention.q_rope": (T, H, K),
        "attention.k_rope": (T, G, K),
        "attention.scores": (H, T, S),
        "attention.weights": (H, T, S),
        "attention.heads": (T, H, K),
        "attention.out": (T, D),
        "attention_residual": (T, D),
        "ffn_norm": (T, D),
        "feed_forward.gate": (T, F),
        "feed_forward.up": (T, F),
        "feed_forward.act": (T, F),
        "feed_forward.out": (T, D),
        "out": (T, D),
    }
    expected = {"tok_embeddings": (T, D)}
    for i in range(config.n_layers):
        expected |= {f"layers.{i}.{key}": shape for key, shape in layer.items()}
    expected |= {"norm": (T, D), "logits": (T, V)}
    assert list(seen.items()) == list(expected.items())
    assert {x.dtype.name for x in (*held(cache, config, 0), *held(cache, config, config.n_layers - 1))} == {dtype}


@pytest.mark.parametrize("storage", ["uint16", "float16"])
def test_packed_parameters_compute_in_float32(storage):
    def pack(x):
        return x.astype(np.float16) if storage == "float16" else (x.view(np.uint32) >> 16).astype(np.uint16)

    params = {name: pack(x) if x.ndim == 2 else x for name, x in PARAMS.items()}
    dtypes = set()
    logits = forward(params, GROUPED, TOKENS, tap=lambda name, x: dtypes.add(x.dtype) or x)
    assert dtypes == {np.dtype("float32")}
    widened = {
        name: x
        if x.ndim == 1
        else (x.astype("float32") if storage == "float16" else (x.astype("uint32") << 16).view("float32"))
        for name, x in params.items()
    }
    assert relative_error(logits, forward(widened, GROUPED, TOKENS)) < 2e-6


@pytest.mark.parametrize("storage", ["float32", "float64", "float16", "uint16"])
def test_foreign_byte_order_gives_the_same_bits(storage):
    """Pass parameters and tokens as another machine wrote them, memory-mapped in its order."""
    params = random_params(GROUPED, seed=1, dtype="float64" if storage == "float64" else "float32")
    if storage in ("float16", "uint16"):
        pack = (lambda x: x.astype(np.float16)) if storage == "float16" else to_bfloat16
        params = {name: pack(x) if x.ndim == 2 else x for name, x in params.items()}
    others, seen = {name: byte_swapped(x) for name, x in params.items()}, []
    assert not any(x.dtype.isnative for x in others.values())
    expected = forward(params, GROUPED, TOKENS)
    found = forward(others, GROUPED, byte_swapped(TOKENS), KVCache(GROUPED))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    watched = forward(others, GROUPED, TOKENS, tap=lambda name, x: seen.append(x.dtype) or x)
    np.testing.assert_array_equal(watched, forward(params, GROUPED, TOKENS, tap=lambda name, x: x))
    assert all(dtype.isnative for dtype in seen)


def test_a_tap_can_replace_an_activation():
    def tap(name, x):
        return np.zeros_like(x) if name in ("layers.0.attention.out", "layers.0.feed_forward.out") else x

    without_layer_0 = {
        name.replace("layers.1.", "layers.0."): x for name, x in PARAMS.items() if not name.startswith("layers.0.")
    }
    expected = forward(without_layer_0, dataclasses.replace(GROUPED, n_layers=1), TOKENS)
    np.testing.assert_array_equal(forward(PARAMS, GROUPED, TOKENS, tap=tap), expected)


def test_last_only_is_the_last():
    for tokens in (TOKENS, TOKENS.reshape(3, 8)):
        all_logits = forward(PARAMS, GROUPED, tokens)
        last = forward(PARAMS, GROUPED, tokens, last_only=True)
        assert last.shape == (*tokens.shape[:-1], 1, GROUPED.vocab_size)
        assert relative_error(last, all_logits[..., -1:, :]) < 2e-6


def test_tied_output_is_the_embedding():
    tied = dataclasses.replace(GROUPED, tied_embeddings=True)
    params = {name: x for name, x in PARAMS.items() if name != "output.weight"}
    separate = {**params, "output.weight": params["tok_embeddings.weight"]}
    np.testing.assert_array_equal(forward(params, tied, TOKENS), forward(separate, GROUPED, TOKENS))


def test_untied_logits_come_from_the_output_matrix():
    params = random_params(GROUPED, seed=1)
    doubled = params | {"output.weight": 2 * params["output.weight"]}
    assert np.array_equal(forward(doubled, GROUPED, TOKENS), 2 * forward(params, GROUPED, TOKENS))


def test_an_interrupted_pass_leaves_the_cache_as_it_was():
    cache = KVCache(GROUPED)
    forward(PARAMS, GROUPED, TOKENS[:5], cache)

    def interrupt(name, x):
        if name == "layers.1.attention.q":
            raise KeyboardInterrupt
        return x

    with pytest.raises(KeyboardInterrupt):
        forward(PARAMS, GROUPED, TOKENS[:9], cache, tap=interrupt)
    assert cache.length == 5
    resumed = forward(PARAMS, GROUPED, TOKENS[5:], cache)
    assert relative_error(resumed, forward(PARAMS, GROUPED, TOKENS)[5:]) < 3e-6


def test_the_cache_grows_by_doubling_and_lends_its_own_memory():
    cache = KVCache(GROUPED)
    copied_at = []
    for i, token in enumerate(itertools.islice(itertools.cycle(TOKENS), 200)):
        before = held(cache, GROUPED, 0)[0] if i else np.empty(0)
        forward(PARAMS, GROUPED, [token], cache, last_only=True)
        copied_at += [] if np.shares_memory(held(cache, GROUPED, 0)[0], before) else [i]
        assert cache.length == i + 1
    assert copied_at == [0, 1, 2, 4, 8, 16, 32, 64, 128]  # when it is full and not before
    assert all(np.shares_memory(*pair) for pair in zip(held(cache, GROUPED, 0), held(cache, GROUPED, 0), strict=True))


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        ([3, 131], r"token id 131 is outside the vocabulary: expected 0 to 130"),
        ([], r"expected a list or an array of at least one whole number"),
        ([0.5], r"tokens of shape \(1,\) and dtype float64: expected a list or an array of at least one whole number"),
        (5, r"tokens of shape \(\) and dtype int(64|32): expected a list or an array"),
        (iter([5]), r"tokens of shape \(\) and dtype object: expected a list or an array"),
        ([[1, 2], [3]], r"rows of tokens have different lengths: expected the shorter ones padded with -1"),
        ([1] * 513, r"513 tokens do not fit the model's context of 512"),
    ],
)
def test_bad_tokens_are_refused_in_one_line(tokens, line):
    with pytest.raises(ValueError, match=line):
        forward(PARAMS, GROUPED, tokens)


def test_a_cache_of_another_batch_is_refused():
    with pytest.raises(ValueError, match=r"batch shape \(2,\), but the cache was made for \(3,\)"):
        forward(PARAMS, GROUPED, np.zeros((2, 4), int), KVCache(GROUPED, (3,)))


def test_every_constant_reaches_the_numbers():
    """Change each constant that has no shape to show for it, and the logits change: none is hard-coded."""
    logits = forward(PARAMS, GROUPED, TOKENS)
    for change in (
        {"norm_eps": 1e-2},
        {"rope_theta": 20000.0},
        {"rope_scaling": dataclasses.replace(tiny.LLAMA_3_1, original_max_seq_len=64)},
    ):
        assert relative_error(forward(PARAMS, dataclasses.replace(GROUPED, **change), TOKENS), logits) > 1e-3, change


def test_positions_count_from_zero_through_chunks():
    """Check positions themselves: logits can't tell, since rotation depends only on distances."""
    cache, seen = KVCache(GROUPED), {}
    forward(PARAMS, GROUPED, TOKENS[:5], cache, tap=lambda name, x: seen.setdefault(name, x))
    forward(PARAMS, GROUPED, TOKENS[5:], cache)
    np.testing.assert_array_equal(cache.positions, np.arange(24))
    np.testing.assert_array_equal(seen["layers.0.attention.q_rope"][0], seen["layers.0.attention.q"][0])  # no rotation at 0
    assert np.abs(seen["layers.0.attention.q_rope"][1] - seen["layers.0.attention.q"][1]).max() > 0.1


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda x: None, "None"),
        (lambda x: x[..., :1], r"an array of shape \(3, 1\)"),  # which would broadcast silently
        (lambda x: x.tolist(), r"\[\["),
    ],
)
def test_a_tap_that_returns_something_else_is_named(wrong, found):
    def tap(name, x):
        return wrong(x) if name == "layers.0.ffn_norm" else x

    expected = rf"the tap returned {found}.* for layers\.0\.ffn_norm, expected an array of shape \(3, {GROUPED.dim}\)"
    with pytest.raises(ValueError, match=expected):
        forward(PARAMS, GROUPED, [1, 2, 3], tap=tap)
