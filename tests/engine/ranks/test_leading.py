"""Compute with several ranks, here in threads, what one process computes."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest

from npllama import KVCache, forward, generate, generate_batch
from npllama.checkpoint import Model
from npllama.engine import layout, threads
from npllama.engine.grouped import to_int4
from npllama.engine.ranks import shares
from npllama.engine.ranks.groups import RankError
from npllama.engine.ranks.leading import Leader, Part, follow
from npllama.engine.ranks.passes import Spread, by_all_ranks
from npllama.engine.weights import to_bfloat16, to_int8
from npllama.golden.mistakes import Port
from npllama.golden.precision import Precision, SequentialSums, named, profile
from npllama.golden.trace import record
from npllama.model import FAST, PLAIN

import thread_ranks
import tiny

CLOSE = {"rtol": 0, "atol": 1e-5}  # what float32 may be off by at width 96 (tiny.random_params)
CASES = [(name, size) for name in ("grouped", "one_kv_head", "odd_ffn") for size in (2, 3, 6)] + [
    ("wide_heads", 4),
    ("llama1", 5),
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_logits_are_one_process_s(spread, name, size):
    """Compute in chunks, with padding, a batch, the last token alone; every rank has the same bits of every sum."""
    config = tiny.CONFIGS[name]
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, (2, 12))
    tokens[1, :4] = -1
    ours, ranks = spread(params, config, size)
    expected = forward(params, config, tokens)
    cache = KVCache(config, (2,))
    found = [forward(ours, config, tokens[:, part], cache) for part in (slice(0, 5), slice(5, 6), slice(6, 12))]
    np.testing.assert_allclose(np.concatenate(found, axis=1)[tokens >= 0], expected[tokens >= 0], **CLOSE)
    np.testing.assert_allclose(forward(ours, config, tokens, last_only=True), expected[:, -1:], **CLOSE)
    assert len(ranks[0].sums) == 2 * config.n_layers * 4
    for rank in ranks[1:]:
        for ours_, theirs in zip(ranks[0].sums, rank.sums, strict=True):
            assert ours_.tobytes() == theirs.tobytes()


STORAGES = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": to_bfloat16,
    "int8": to_int8,
    "int4": to_int4,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage(spread, storage, tied):
    config = tiny.config(tied_embeddings=tied)
    params = {name: STORAGES[storage](x) if x.ndim == 2 else x for name, x in tiny.random_params(config, 3).items()}
    if storage == "float64":
        params = {name: x.astype(np.float64) for name, x in params.items()}
    tokens = tiny.random_tokens(config, 4, 40)
    ours, _ = spread(params, config, 3)
    expected, found = forward(params, config, tokens), forward(ours, config, tokens)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_parts_in_memory_lie_as_layout_py_has_them(spread):
    """Lay a part's matrices out adjacent and transposed, as a whole model's."""
    config = tiny.config()
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, 7)
    parts = []
    for share, group in zip(shares.shares(config, 2), thread_ranks.groups(2), strict=True):
        own = layout.in_memory(shares.cut(params, config, share), shares.own_config(config, share), "float32")
        parts.append(Part(config, shares.joined(own, config, group), group))
    threading.Thread(target=follow, args=(parts[1], parts[1].group, named), daemon=True).start()
    leader = Leader(parts[0], parts[0].group)
    np.testing.assert_allclose(
        forward(Spread(parts[0].params, leader.forward), config, tokens), forward(params, config, tokens), **CLOSE
    )
    leader.close()


@pytest.mark.parametrize(("name", "size"), [("grouped", 2), ("one_kv_head", 5), ("odd_ffn", 3)])
def test_the_same_tokens(spread, name, size):
    config = tiny.CONFIGS[name]
    params, prompt = tiny.random_params(config, 5), tiny.random_tokens(config, 6, 11)
    ours, _ = spread(params, config, size)
    expected = list(generate(Model(config, params), prompt, 30))
    assert len(expected) == 30
    assert list(generate(Model(config, ours), prompt, 30)) == expected
    assert list(generate(Model(config, ours), prompt, 30, lookup=4)) == expected


def test_batches_and_caches_of_several_conversations(spread):
    """Keep a cache on every rank for each of rank 0's, truncated with it and freed with it."""
    config = tiny.config()
    params = tiny.random_params(config, 5)
    ours, _ = spread(params, config, 2)
    prompts = [tiny.random_tokens(config, seed, n).tolist() for seed, n in ((1, 3), (2, 9), (3, 6))]
    whole, model = Model(config, params), Model(config, ours)
    assert list(generate_batch(model, prompts, 9)) == list(generate_batch(whole, prompts, 9))
    a, b, one = KVCache(config), KVCache(config), KVCache(config)
    for cache, tokens in ((a, prompts[0]), (b, prompts[1]), (a, prompts[2])):
        forward(ours, config, tokens, cache)
    a.truncate(5)
    found = forward(ours, config, [7, 8], a)
    forward(params, config, [*prompts[0], *prompts[2]][:5], one)
    np.testing.assert_allclose(found, forward(params, config, [7, 8], one), **CLOSE)
    leader = ours.lead.__self__
    del a, b, cache
    gc.collect()
    assert len(leader._numbers) == 0
    assert sorted(leader._gone) == [1, 2], "the next pass has them forgotten"
    forward(ours, config, [1])
    assert not {1, 2} & set(leader._gone)


def test_rows_that_come_and_go(spread):
    """Make passes over different views of a cache: each rank's has the rows of rank 0's."""
    config = tiny.config()
    params = tiny.random_params(config, 5)
    ours, _ = spread(params, config, 2)
    caches = KVCache(config, (4,)), KVCache(config, (4,))
    passes = [(2, 7, None, None), (1, 3, None, None), (slice(4), 1, [0, 1, 1, 0], None), (2, 2, None, 5)]
    passes += [(slice(1, 4), 2, [0, 1, 1], None), (1, 4, None, 0), (slice(0, 3), 1, None, None)]
    for step, (rows, T, active, cut) in enumerate(passes):
        tokens = tiny.random_tokens(config, step, (*caches[0][rows].batch_shape, T))
        found = []
        for weights, cache in zip((params, ours), caches, strict=True):
            view = cache[rows]
            if cut is not None:
                view.truncate(cut)
            if active is not None:
                view = view.only(np.array(active) == 1)
                tokens[np.array(active) == 0] = -1
            found.append(forward(weights, config, tokens, view))
        np.testing.assert_allclose(found[1][tokens >= 0], found[0][tokens >= 0], **CLOSE)
    assert (caches[0].lengths == caches[1].lengths).all()


def test_an_exception_on_another_rank_is_reported(spread, monkeypatch):
    config = tiny.config()
    ours, ranks = spread(tiny.random_params(config, 5), config, 2)
    monkeypatch.setattr(ranks[1], "everyones", lambda x: 1 / 0)
    with pytest.raises(threading.BrokenBarrierError):
        forward(ours, config, [1])
    assert [type(error) for error in ranks[1].errors] == [ZeroDivisionError]
    assert not ranks[0].errors


def test_a_cache_that_differs_from_rank_0_s_is_an_error():
    """Report it, although only a fault of npllama's own can cause it."""
    config = tiny.config()
    group = thread_ranks.groups(2)[1]
    message = {"cache": 0, "rows": [], "at": [], "active": None, "lengths": 3, "shape": [1], "tokens": [1]}
    message |= {"last_only": False, "ops": "FAST", "arithmetic": None, "tapped": False, "forget": []}
    for sent in (message, None):
        group._messages[1].put(sent)
    params = tiny.random_params(config, 5)
    follow(
        Part(config, shares.joined(shares.cut(params, config, shares.shares(config, 2)[1]), config, group), group), group, named
    )
    [error] = group.errors
    assert isinstance(error, RankError)
    assert str(error) == "the cache's rows hold 0 slots, rank 0's 3"


def test_what_several_ranks_can_t_do_is_refused(spread):
    config = tiny.config()
    params = tiny.random_params(config, 5)
    ours, ranks = spread(params, config, 2)
    filled = KVCache(config)
    forward(params, config, [1, 2], filled)
    with pytest.raises(ValueError, match="the cache was filled by another model"):
        forward(ours, config, [3], filled)
    with pytest.raises(ValueError, match=r"only model.PLAIN and model.FAST can be computed by several ranks"):
        forward(ours, config, [3], ops=replace(PLAIN, softmax=lambda x: x))
    with pytest.raises(ValueError, match="the constants are not those of the model"):
        forward(ours, replace(config, norm_eps=1e-3), [3])
    with pytest.raises(ValueError, match="token id 131 is outside the vocabulary"):
        forward(ours, config, [131])
    with pytest.raises(ValueError, match="513 tokens do not fit the model's context of 512"):
        forward(ours, config, [1] * 513)
    with pytest.raises(ValueError, match="but the cache was made for"):
        forward(ours, config, [[1]], KVCache(config))
    assert not any(rank.sums for rank in ranks), "no rank had begun"
    np.testing.assert_allclose(forward(ours, config, [3, 4]), forward(params, config, [3, 4]), **CLOSE)


def test_the_shape_of_405b_on_sixteen_ranks(spread):
    """Compute with 128 query heads on 8 key/value heads, each copied to two ranks, at small widths."""
    config = tiny.config(dim=64, n_heads=128, n_kv_heads=8, head_dim=4, ffn_dim=16 * 64, vocab_size=16 * 64, n_layers=1)
    params, tokens = tiny.random_params(config, 7), tiny.random_tokens(config, 8, 20)
    ours, _ = spread(params, config, 16)
    np.testing.assert_allclose(forward(ours, config, tokens), forward(params, config, tokens), **CLOSE)


# ------------------------------------------------------------------------------------------------------------------------ taps


@pytest.mark.parametrize(("name", "size"), [("grouped", 2), ("grouped", 6), ("one_kv_head", 4), ("odd_ffn", 3)])
def test_a_tap_is_shown_whole_activations(spread, name, size):
    config = tiny.CONFIGS[name]
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, 9)
    ours, _ = spread(params, config, size)
    expected, found = record(Model(config, params), tokens), record(Model(config, ours), tokens)
    assert list(found) == list(expected)
    for key in expected:
        assert found[key].shape == expected[key].shape
        assert found[key].dtype == expected[key].dtype
        np.testing.assert_allclose(found[key], expected[key], err_msg=key, **CLOSE)


@pytest.mark.parametrize("name", ["tok_embeddings", "layers.0.attention.k_rope", "layers.1.attention.weights"])
def test_what_a_tap_returns_is_what_all_ranks_go_on_with(spread, name):
    config = tiny.config()
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, 9)
    ours, _ = spread(params, config, 3)

    def patch(key, x):
        return x[::-1] * np.float32(0.5) if key == name else x

    expected = forward(params, config, tokens, tap=patch)
    np.testing.assert_allclose(forward(ours, config, tokens, tap=patch), expected, **CLOSE)
    assert np.abs(expected - forward(params, config, tokens)).max() > 1e-3


def test_threads_of_a_rank_share_no_part_that_waits_for_others(monkeypatch):
    """Keep sums out of shared tasks, where threads would come to them in any order."""
    monkeypatch.setattr(threads, "n_threads", lambda: 2)
    monkeypatch.setattr("npllama.engine.fast.n_threads", lambda: 2)
    config = tiny.config(n_layers=1)
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, 512)
    ranks = thread_ranks.groups(1)
    part = Part(config, shares.joined(shares.cut(params, config, shares.shares(config, 1)[0]), config, ranks[0]), ranks[0])
    forward(part.params, config, tokens, ops=FAST)
    assert [len(x) for x in ranks[0].sums] == [512, 512]


def test_a_pass_over_other_parameters_is_the_function_s_own():
    assert by_all_ranks(lambda params, *rest: (params, *rest))({}, 1, 2) == ({}, 1, 2, None, None, False, None)


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16-hf", "sequential-sums"])
def test_every_rank_computes_in_the_precision_of_the_pass(spread, name, storage):
    """Compare activations with those of one process: ranks that rounded otherwise, or not at all, would be further off."""
    config = tiny.config()
    params = {key: STORAGES[storage](x) if x.ndim == 2 else x for key, x in tiny.random_params(config, 1).items()}
    tokens, precision = tiny.random_tokens(config, 2, 9), named(name)
    ours, _ = spread(params, config, 3)
    # One sum that rounds to the next bfloat16 changes all that follows by about as much.
    bound = {"float64": 1e-13, "bfloat16-hf": 3e-2}.get(name, 1e-5)
    expected, found = (record(Model(config, p), tokens, 1, precision=precision) for p in (params, ours))
    assert list(found) == list(expected)
    for key in expected:
        assert found[key].dtype == precision.dtype
        np.testing.assert_allclose(
            found[key], expected[key], rtol=0, atol=bound * np.abs(expected["logits"]).max(), err_msg=key
        )
        np.testing.assert_array_equal(found[key], precision.round(found[key]))


def test_a_float64_pass_is_more_exact_than_float32(spread):
    """Compute in float64 on every rank, not only on rank 0."""
    config = tiny.config()
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, 9)
    ours, _ = spread(params, config, 2)
    exact = profile("float64").forward(params, config, tokens)
    errors = [np.abs(profile(name).forward(ours, config, tokens) - exact).max() for name in ("float64", "float32")]
    assert errors[0] < 1e-13 < 1e-8 < errors[1]


def test_profiles_and_operations_that_ranks_do_not_know_are_refused(spread):
    config = tiny.config()
    ours, ranks = spread(tiny.random_params(config, 5), config, 2)
    model = Model(config, ours)
    with pytest.raises(ValueError, match="rounding profile int8-activations is computed in one process only: found several"):
        record(model, [1, 2], precision=profile("int8-activations"))
    with pytest.raises(ValueError, match=r"only model.PLAIN and model.FAST can be computed by several ranks"):
        record(model, [1, 2], precision=Port("half_split"))
    assert not any(rank.sums for rank in ranks), "no rank had begun"


def test_names_of_precisions_lead_back_to_them():
    for precision in (Precision("float64"), Precision("bfloat16", "hf"), Precision("float16"), SequentialSums()):
        assert named(precision.profile) == precision
        assert type(named(precision.profile)) is type(precision)
