"""Check shares: every head, channel and row belongs to exactly one rank, and its part of the parameters agrees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama import parameter_shapes
from npllama.engine.grouped import Grouped, to_int4
from npllama.engine.ranks import shares
from npllama.engine.weights import Int8, to_int8

import tiny
from thread_ranks import groups


@given(
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(1, 40),
    st.sampled_from([2, 64]),
)
def test_every_head_channel_and_row_is_covered_exactly_once(G, R, F, V, size, K):
    config = tiny.config(n_heads=G * R, n_kv_heads=G, ffn_dim=F, vocab_size=V, head_dim=K)
    if size > min(G * R, F, V):
        with pytest.raises(ValueError, match=f"{size} ranks, but the model has "):
            shares.shares(config, size)
        return
    parts = shares.shares(config, size)
    for count, field in ((G * R, "heads"), (G, "own_kv_heads"), (F, "ffn"), (V, "vocabulary")):
        covered = [i for part in parts for i in range(count)[getattr(part, field)]]
        assert covered == list(range(count)), field
    for part in parts:
        kv_heads, heads = range(G)[part.kv_heads], range(G * R)[part.heads]
        assert {head // R for head in heads} == set(kv_heads)
        assert set(range(G)[part.own_kv_heads]) <= set(kv_heads)
        own = shares.own_config(config, part)  # which Config accepts
        assert (own.n_heads, own.n_kv_heads) == (len(heads), len(kv_heads))
        # model.py gives each key/value head the same number of query heads, in order.
        assert [kv_heads[i // (own.n_heads // own.n_kv_heads)] for i in range(own.n_heads)] == [head // R for head in heads]
        for block in (2, 32, 64, 256):  # of quantised numbers
            assert size * block > F or part.ffn.start % block == 0


@pytest.mark.parametrize("block", [2, 32, 64, 256])
def test_what_has_a_block_for_each_rank_is_cut_between_blocks(block):
    """Cut between blocks of quantised formats, and between 64 numbers of 16 bits, which are two cache lines."""
    for n in (3 * block, 3 * block + 1, 5 * block - 1):
        parts = [share.ffn for share in shares.shares(tiny.config(ffn_dim=n), 3)]
        assert [part.start % block for part in parts] == [0, 0, 0]
        assert [part.stop for part in parts] == [parts[1].start, parts[2].start, n]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_the_slices_that_the_shares_say(size, tied):
    config = tiny.config(tied_embeddings=tied)
    params = tiny.random_params(config, 1)
    K = config.head_dim
    for share, group in zip(shares.shares(config, size), groups(size), strict=True):
        parts = shares.cut(params, config, share)
        whole = params if not tied else {**params, "output.weight": params["tok_embeddings.weight"]}
        q, kv = (slice(s.start * K, s.stop * K) for s in (share.heads, share.kv_heads))
        cuts = {"wq": q, "wk": kv, "wv": kv, "w1": share.ffn, "w3": share.ffn, "output": share.vocabulary}
        for name, weight in parts.items():
            leaf = name.split(".")[-2]
            expected = whole[name][cuts[leaf]] if leaf in cuts else whole[name]
            expected = whole[name][:, q if leaf == "wo" else share.ffn] if leaf in ("wo", "w2") else expected
            np.testing.assert_array_equal(weight, expected)
        assert set(parts) == {*params, "output.weight"}
        assert {name: weight.shape for name, weight in parts.items()} == shares.part_shapes(config, share)
        own = shares.own_config(config, share)
        shapes = {**parameter_shapes(own), "tok_embeddings.weight": (config.vocab_size, config.dim)}
        found = shares.joined(parts, config, group)
        assert set(found) == set(shapes), "the names that model.py looks up"
        names = set(found) - {"output.weight", "tok_embeddings.weight"}
        assert {name: found[name].shape for name in names} == {name: shapes[name] for name in names}


def test_int8_columns_keep_the_scales_of_their_rows():
    config = tiny.config()
    name = "layers.0.feed_forward.w2.weight"
    params = {**tiny.random_params(config, 1)}
    whole = params[name] = to_int8(params[name])
    for share in shares.shares(config, 2):
        part = shares.cut(params, config, share)[name]
        assert isinstance(part, Int8)
        np.testing.assert_array_equal(part.widen(), whole.widen()[:, share.ffn])


@pytest.mark.parametrize(("name", "group"), [("feed_forward.w2", 32), ("attention.wo", 16)])
def test_quantised_columns_stay_quantised(name, group):
    """Cut groups of 32 in two where a share of three heads of 16 numbers ends inside one."""
    config, name = tiny.config(ffn_dim=96), f"layers.0.{name}.weight"
    params = tiny.random_params(config, 1)
    quantised = params[name] = to_int4(params[name])
    for share in shares.shares(config, 2):
        part = shares.cut(params, config, share)[name]
        columns = share.ffn if group == 32 else slice(share.heads.start * 16, share.heads.stop * 16)
        assert isinstance(part, Grouped)
        assert part.grouping.group == group
        np.testing.assert_array_equal(part.widen(), quantised.widen()[:, columns])


def test_a_part_alone_is_not_taken_for_the_matrix():
    config = tiny.config()
    [share, _], [group, _] = shares.shares(config, 2), groups(2)
    shard = shares.joined(shares.cut(tiny.random_params(config, 1), config, share), config, group)["output.weight"]
    for read in (lambda: shard.widen(), lambda: shard.rows(slice(1)), lambda: shard.columns(slice(1))):
        with pytest.raises(ValueError, match="a rank has only its own part of this matrix"):
            read()


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_parts_are_gathered_along_their_axis(axis):
    """Gather parts one of which is empty, and one of which another rank has a copy of."""
    whole = tiny.uniform(3, (4, 5, 6))
    n, everyone = whole.shape[axis], groups(3)
    ends, own = [0, 2, 2, n], [None, None, slice(1, None)]

    def gathered(rank):
        start, stop = ends[rank], ends[rank + 1]
        x = shares.along(whole, axis, slice(start - (own[rank] is not None), stop))
        return shares.gathered(x, axis, everyone[rank], own[rank], np.diff(ends).tolist())

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(gathered, range(3)):
            assert found.tobytes() == whole.tobytes()
