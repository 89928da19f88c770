"""Test convert --ranks N: each rank's directory holds its share of the whole model."""

from __future__ import annotations

import json

import numpy as np
import pytest

import npllama
from npllama.checkpoint import open_model, verify
from npllama.engine import threads
from npllama.engine.ranks import shares
from npllama.engine.weights import form_of, widen

import tiny
from conversions import convert, refused

pytest.importorskip("safetensors", reason="safetensors is not installed")
foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)


@pytest.fixture(autouse=True)
def small_blocks(quick_conversion):
    """Read in blocks of a few rows."""


def assert_parts_of(whole, folder, size: int) -> None:
    """Check that each rank's directory has exactly the parts that shares.cut() takes of the whole, in the same form."""
    model = open_model(whole)
    for share in shares.shares(model.config, size):
        own = folder / f"rank-{share.rank}-of-{size}"
        assert verify(own) == []
        found = open_model(own)
        assert found.config == model.config
        expected = shares.cut(model.params, model.config, share)
        assert found.params.keys() == expected.keys()
        for name, weight in expected.items():
            assert type(form_of(found.params[name])) is type(form_of(weight)), name
            np.testing.assert_array_equal(widen(found.params[name]), widen(weight), err_msg=name)


@pytest.mark.parametrize(("name", "size"), [("grouped", 3), ("one_kv_head", 2), ("odd_ffn", 6)])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_parts_are_those_of_the_whole(tmp_path, name, size, dtype):
    """Test tied and untied models, uneven shares, and key/value heads that several ranks hold."""
    config = tiny.CONFIGS[name]
    source = foreign.write_hf(tmp_path / "hf", config, tiny.random_params(config, 1), "bfloat16")
    convert(source, tmp_path / "whole", dtype=dtype)
    convert(source, tmp_path / "m", dtype=dtype, ranks=size)
    assert_parts_of(tmp_path / "whole", tmp_path / "m", size)


@pytest.mark.parametrize(("tied", "head_dim"), [(False, 32), (True, 16)])
def test_quantised_blocks_are_kept(tmp_path, tied, head_dim):
    """Check that groups of 32 are split in two where a share of three heads of 16 numbers is no whole number of groups."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    config = tiny.config(head_dim=head_dim, tied_embeddings=tied)
    source = foreign.write_gguf(tmp_path / "m.gguf", config, tiny.random_params(config, 1), "Q4_0")
    convert(source, tmp_path / "whole")
    convert(source, tmp_path / "m", ranks=2)
    assert_parts_of(tmp_path / "whole", tmp_path / "m", 2)


def test_int8_scales_of_columns_are_each_rank_s_own(tmp_path):
    """Check that a part is never less exact than the whole row, whose largest number may be in another rank's part."""
    config = tiny.config()
    params = tiny.random_params(config, 1)
    source = foreign.write_hf(tmp_path / "hf", config, params)
    convert(source, tmp_path / "m", dtype="int8", ranks=2)
    name = "layers.0.feed_forward.w2.weight"
    for share in shares.shares(config, 2):
        weight = open_model(tmp_path / "m" / f"rank-{share.rank}-of-2").params[name]
        own = params[name][:, share.ffn]
        assert (np.abs(widen(weight) - own) <= np.abs(own).max(axis=1, keepdims=True) / 127 / 2 * (1 + 1e-5)).all()


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Make a model's directory, and one for each of two ranks."""
    folder = tmp_path_factory.mktemp("spread")
    config = tiny.config()
    source = foreign.write_hf(folder / "hf", config, tiny.random_params(config, 1), "bfloat16")
    convert(source, folder / "whole")
    convert(source, folder / "m", ranks=2)
    return folder


def test_two_processes_compute_what_one_does(spread):
    before = threads.n_threads()
    one, two = npllama.load(spread / "whole"), npllama.load(spread / "m", processes=2)
    try:
        found, expected = (npllama.forward(model.params, model.config, [1, 2, 3]) for model in (two, one))
    finally:
        two.params.lead.__self__.close()
        threads.set_threads(before)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_share_is_for_its_own_rank(spread, tmp_path):
    with pytest.raises(ValueError, match=r"m holds rank-0-of-2, expected rank-0-of-1: "):
        npllama.load(spread / "m")
    with pytest.raises(ValueError, match=r"m holds rank-0-of-2, expected rank-0-of-3"):
        npllama.load(spread / "m", processes=3)
    with pytest.raises(ValueError, match=r"rank-1-of-2 is the share of rank 1 of 2, expected rank 0 of 1"):
        npllama.load(spread / "m" / "rank-1-of-2")
    (tmp_path / "rank-0-of-2").symlink_to(spread / "m" / "rank-1-of-2")  # under another's name
    with pytest.raises(ValueError, match=r"is the share of rank 1 of 2, expected rank 0 of 2"):
        npllama.load(tmp_path, processes=2)


@pytest.mark.parametrize("share", [3, {}, {"rank": 2, "size": 2}, {"rank": -1, "size": 2}, {"rank": 0.0, "size": 2}])
def test_a_manifest_s_share_is_checked(spread, tmp_path, share):
    config = (spread / "m" / "rank-0-of-2" / "config.json").read_text()
    manifest = json.loads((spread / "m" / "rank-0-of-2" / "manifest.json").read_text())
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"share": share}))
    with pytest.raises(ValueError, match=r"share is .*, expected a rank below a size"):
        open_model(tmp_path)


def test_what_can_t_be_split_is_refused(spread, tmp_path):
    refused(spread / "hf", tmp_path / "m", "7 ranks, but the model has 6 query heads", ranks=7)
    refused(spread / "hf", tmp_path / "m", "the number of ranks is 0, expected 1 or more", ranks=0)
    refused(spread / "hf", spread / "whole", "whole is a model directory, expected a folder for those of 2 ranks", ranks=2)
